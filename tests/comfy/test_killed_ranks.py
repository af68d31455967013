"""A rank that dies is reported where it hurts, and the next prompt gets a new group."""

import os
import signal
from collections.abc import Callable

import psutil
import pytest

from support.comfy_history import PromptError
from support.comfy_server import ComfyServer
from support.waiting import wait_until
from support.workflows import Sampling, tp_text_to_latent

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"

Works = Callable[[], list[int]]


def assert_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def test_between_prompts(works: Works) -> None:
    """Nobody was waiting for it, so nobody hears of it."""
    pids = works()
    os.kill(pids[0], signal.SIGKILL)
    assert_gone(pids)  # the other one, too
    assert not set(works()) & set(pids)


def test_during_a_prompt(comfy_server: ComfyServer, works: Works) -> None:
    pids = works()
    comfy_server.events.clear()
    prompt_id = comfy_server.queue(tp_text_to_latent(MODEL, sampling=Sampling(steps=5000)))
    comfy_server.events.wait_for("progress", lambda event: event.data["value"] >= 3)
    comfy_server.kill_in_mid_evaluation(pids[1])
    with pytest.raises(PromptError) as error:
        comfy_server.wait(prompt_id, timeout_s=60)
    print(f"{error.value.type}: {error.value.message}")
    assert error.value.node_id == "sampler"
    assert error.value.type.endswith("GroupDiedError")
    assert f"Rank 1 (process {pids[1]}) was killed by signal 9" in error.value.message
    assert_gone(pids)
    assert not set(works()) & set(pids)
