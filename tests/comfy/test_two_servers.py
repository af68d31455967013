"""Two ComfyUIs on one machine, and prompts that are queued faster than they run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.comfy_server import ComfyServer
from support.group_reports import rank_pids
from support.workflows import Sampling, tp_text_to_latent

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"
Works = Callable[[], list[int]]


def test_each_has_its_own_group(
    comfy_server: ComfyServer,
    works: Works,
    references: dict[int, torch.Tensor],
    tiny_z_image: Path,
) -> None:
    pids = works()
    with ComfyServer(env={"CUDA_VISIBLE_DEVICES": ""}) as other:
        (other.models / "diffusion_models" / MODEL).symlink_to(tiny_z_image)
        queued = []
        for _ in range(3):
            for seed in references:  # another prompt than the one before: nothing is cached
                prompt = tp_text_to_latent(MODEL, sampling=Sampling(seed=seed))
                queued += [(server, seed, server.queue(prompt)) for server in (comfy_server, other)]
        found = {id(comfy_server): pids, id(other): []}
        for server, seed, prompt_id in queued:
            history = server.wait(prompt_id)
            assert torch.allclose(server.latent(history), references[seed], atol=1e-5)
            ranks = found[id(server)] or rank_pids(history)
            assert rank_pids(history) == ranks
            found[id(server)] = ranks
        assert not set(found[id(comfy_server)]) & set(found[id(other)])
    assert works() == pids
