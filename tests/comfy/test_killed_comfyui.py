"""`kill -9` of ComfyUI takes the ranks with it."""

import time

import psutil
import pytest

from support.comfy_server import ComfyServer
from support.leaks import Footprint, assert_nothing_added
from support.tiny_models import write_z_image
from support.workflows import Sampling, tp_text_to_latent

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"
LIMIT_S = 5.0


def test_in_mid_sampling() -> None:
    before = Footprint.now()
    with ComfyServer(env={"CUDA_VISIBLE_DEVICES": ""}) as server:
        write_z_image(server.models / "diffusion_models" / MODEL)
        server.queue(tp_text_to_latent(MODEL, sampling=Sampling(steps=5000)))
        server.events.wait_for("progress", lambda event: event.data["max"] == 5000)
        children = server.children()
        assert len(server.ranks()) == 2
        server.kill()
        start = time.monotonic()
        _, left = psutil.wait_procs(children, timeout=LIMIT_S)
        assert not left
        print(f"they were gone {time.monotonic() - start:.2f} s after ComfyUI was killed")
        assert_nothing_added(before, within_s=LIMIT_S)
