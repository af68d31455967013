"""Two hundred prompts that alternate models, sizes and LoRAs: nothing grows."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from support.comfy_server import ComfyServer
from support.lora_files import write_lora
from support.tiny_models import write_z_image
from support.workflows import Prompt, Sampling, node, text_to_latent, tp_loader

pytestmark = pytest.mark.comfy

MODELS = ("tiny_z_image.safetensors", "another_z_image.safetensors")
LORAS = ("one.safetensors", "two.safetensors")
LAYERS = [("layers.0.attention.out", (480, 480)), ("layers.1.attention.qkv", (1440, 480))]
SIZES = ((64, 64), (96, 64), (128, 128))
COUNT = 200
WARM_UP = 20
# Allocators keep some of what was freed; ComfyUI's history and latents on disk grow a little.
MAX_GROWTH = 0.05


@dataclass(frozen=True)
class Usage:
    """Of the server and each of its ranks, by process id: bytes of memory, open files; shared."""

    rss: dict[int, int]
    files: dict[int, int]
    shared: int

    @classmethod
    def of(cls, server: ComfyServer) -> "Usage":
        processes = [psutil.Process(server.process.pid), *server.children()]
        return cls(
            {process.pid: process.memory_info().rss for process in processes},
            {process.pid: process.num_fds() for process in processes},
            sum(_exchange_bytes(process.pid) for process in processes),
        )


def _exchange_bytes(pid: int) -> int:
    """Of the anonymous shared memory that the process has open."""
    memories = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:tp-runtime-exchange" in str(link.readlink()):
            stat = link.stat()
            memories[stat.st_ino] = stat.st_size
    return sum(memories.values())


@pytest.fixture
def server(comfy_server: ComfyServer) -> ComfyServer:
    folder = comfy_server.models / "diffusion_models"
    write_z_image(folder / MODELS[1], seed=1)
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


def test_nothing_grows(server: ComfyServer) -> None:
    usages = {}
    for index in range(COUNT):
        server.run(prompt_of(index))
        if index + 1 in (WARM_UP, COUNT // 2, COUNT):
            usages[index + 1] = Usage.of(server)
            print(index + 1, usages[index + 1])
    before, after = usages[WARM_UP], usages[COUNT]
    assert after.rss.keys() == before.rss.keys(), "the same processes"
    assert after.files == before.files
    assert after.shared == before.shared
    for pid, rss in after.rss.items():
        assert rss <= before.rss[pid] * (1 + MAX_GROWTH), pid
