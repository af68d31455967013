"""Two ComfyUI servers on one machine, the second for several users: each has its own ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.comfy_server import NO_GPU, ComfyServer
from support.group_reports import rank_pids
from support.workflows import Sampling, tp_text_to_latent

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(2, "servers of their own")]

MODEL = "tiny_z_image.safetensors"
TOLERANCE = 1e-5

Works = Callable[[], list[int]]


def test_they_do_not_disturb_each_other(
    comfy_server: ComfyServer, works: Works, tiny_z_image: Path
) -> None:
    pids = works()
    with ComfyServer(env=NO_GPU, extra_args=("--cpu", "--multi-user")) as other:
        (other.models / "diffusion_models" / MODEL).symlink_to(tiny_z_image)
        # Two prompts queued one after another on each, all four at the same time.
        queued = {
            (server, seed): server.queue(tp_text_to_latent(MODEL, sampling=Sampling(seed=seed)))
            for seed in (91, 92)
            for server in (comfy_server, other)
        }
        histories = {key: key[0].wait(prompt_id) for key, prompt_id in queued.items()}
        for seed in (91, 92):
            ours, theirs = histories[comfy_server, seed], histories[other, seed]
            assert rank_pids(ours) == pids
            assert not set(rank_pids(theirs)) & set(pids)
            expected = comfy_server.latent(ours)
            difference = (other.latent(theirs) - expected).abs().max()
            assert difference <= TOLERANCE * expected.std()
    assert works() == pids
