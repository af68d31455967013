"""Prompts that alternate models, sizes and LoRAs: nothing grows."""

import pytest

from support.comfy_server import ComfyServer
from support.lora_files import write_lora
from support.tiny_models import write_tiny
from support.usage import Usage
from support.workflows import Prompt, Sampling, node, text_to_latent, tp_loader

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(2, "servers of their own")]

MODELS = ("tiny_z_image.safetensors", "another_z_image.safetensors")
LORAS = ("one.safetensors", "two.safetensors")
LAYERS = [("layers.0.attention.out", (480, 480)), ("layers.1.attention.qkv", (1440, 480))]
SIZES = ((64, 64), (96, 64), (128, 128))
COUNT, COUNT_OF_EVERYTHING = 40, 200
WARM_UP = 20
# A model that no node holds any more is freed, and a file read to the end closed, a moment later:
# the least counts.
LOOKS = 4
# Allocators keep some of what was freed; ComfyUI's history and latents on disk grow a little.
MAX_GROWTH = 0.05


@pytest.fixture
def server(comfy_server: ComfyServer) -> ComfyServer:
    folder = comfy_server.models / "diffusion_models"
    write_tiny("z_image", folder / MODELS[1], seed=1)
    for seed, name in enumerate(LORAS):
        write_lora(comfy_server.models / "loras" / name, LAYERS, seed=seed)
    return comfy_server


def prompt_of(index: int) -> Prompt:
    width, height = SIZES[index % len(SIZES)]
    sampling = Sampling(seed=1000 + index, steps=1 + index % 2, width=width, height=height)
    prompt = text_to_latent(tp_loader(MODELS[index % 2], 2), sampling=sampling)
    if index % 4:
        prompt["lora"] = node(
            "LoraLoaderModelOnly",
            model=["model", 0],
            lora_name=LORAS[index // 4 % 2],
            strength_model=0.1 * (index % 7),
        )
        prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    return prompt


def test_nothing_grows(server: ComfyServer, everything: bool) -> None:
    count = COUNT_OF_EVERYTHING if everything else COUNT
    marks: dict[int, list[Usage]] = {WARM_UP: [], count // 2: [], count: []}
    for index in range(count):
        server.run(prompt_of(index))
        for mark, usages in marks.items():
            if mark - LOOKS < index + 1 <= mark:
                usages.append(Usage.of(server))
                print(index + 1, usages[-1])
    before, after = marks[WARM_UP], marks[count]
    for one in (*before, *after):
        assert one.rss.keys() == before[0].rss.keys(), "the same processes"
        assert one.shared == before[0].shared
    for pid in before[0].rss:
        least = min(usage.rss[pid] for usage in before)
        assert min(usage.rss[pid] for usage in after) <= least * (1 + MAX_GROWTH), pid
        fewest = min(usage.files[pid] for usage in before)
        assert min(usage.files[pid] for usage in after) <= fewest, pid
