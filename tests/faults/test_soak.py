"""A real ComfyUI, random prompts and faults: the right picture or the right error, each time.

As long as `SOAK_MINUTES` says (`make soak`: thirty), and not at all without it: it still finds a
fault. A rank that dies while another request is under way than the prompt's own (weights that are
freed in the background) ends the prompt with GroupClosedError instead of a new group.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from faults.conftest import put

from support.comfy_history import PromptError
from support.comfy_server import ComfyServer
from support.leaks import nothing_left_over
from support.lora_files import write_lora
from support.tiny_models import write_z_image
from support.workflows import Prompt, Sampling, node, stock_twin, text_to_latent, tp_loader
from tp_runtime.group_folder import KEPT_FOLDERS

MINUTES = float(os.environ.get("SOAK_MINUTES", "0"))
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.timeout(MINUTES * 60 + 900),
    pytest.mark.skipif(not MINUTES, reason="run it with make soak, or set SOAK_MINUTES"),
]

MODELS = ("one.safetensors", "two.safetensors")
LORA = "lora.safetensors"
LAYERS = [("layers.0.attention.out", (480, 480)), ("layers.1.attention.qkv", (1440, 480))]
SEEDS = (7, 8, 9)
TOLERANCE = 1e-5  # of the standard deviation
PROMPT_S = 180.0
CALL_TIMEOUT_S = 20
MAX_GROWTH = 0.15  # of the server's memory, after the first quarter
FAULTS = {
    "die": "GroupDiedError",
    "raise": "RankError",
    "out of memory": "RankMemoryError",
    "stop": "CallTimeoutError",
}


class Soak:
    """The server, what it should answer, and what has been done to it."""

    def __init__(self, server: ComfyServer, faults: Path, seed: int) -> None:
        self.server = server
        self.faults = faults
        self.random = Random(seed)
        self.done: Counter[str] = Counter()
        self._references: dict[str, torch.Tensor] = {}
        self._last_seed = 0

    def prompt(self, steps: int = 2) -> Prompt:
        """A random one, of another seed than the last: ComfyUI would run nothing again."""
        seed = self.random.choice([seed for seed in SEEDS if seed != self._last_seed])
        self._last_seed = seed
        loader = tp_loader(self.random.choice(MODELS), 2)
        prompt = text_to_latent(loader, sampling=Sampling(seed=seed, steps=steps))
        if self.random.random() < 0.5:
            prompt["lora"] = node(
                "LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=0.5
            )
            prompt["sampler"]["inputs"]["model"] = ["lora", 0]
        return prompt

    def picture(self) -> None:
        prompt = self.prompt()
        key = repr(prompt)
        if key not in self._references:
            history = self.server.run(stock_twin(prompt), PROMPT_S)
            self._references[key] = self.server.latent(history)
        found = self.server.latent(self.server.run(prompt, PROMPT_S))
        expected = self._references[key]
        assert (found - expected).abs().max() / expected.std() <= TOLERANCE

    def cancel(self) -> None:
        self.server.events.clear()
        prompt_id = self.server.queue(self.prompt(steps=5000))
        self.server.events.wait_for("progress", lambda event: event.data["max"] == 5000)
        time.sleep(self.random.uniform(0, 1))
        self.server.interrupt()
        with pytest.raises(PromptError) as caught:
            self.server.wait(prompt_id, PROMPT_S)
        assert caught.value.type == "interrupted"

    def fault(self, action: str) -> None:
        put(self.faults, rank=self.random.randrange(2), point="denoise", action=action)
        with pytest.raises(PromptError) as caught:
            self.server.run(self.prompt(), PROMPT_S)
        assert caught.value.node_id == "sampler"
        assert caught.value.type.endswith(FAULTS[action]), caught.value
        assert not self.faults.exists()

    def kill_between_prompts(self) -> None:
        if ranks := self.ranks():
            self.random.choice(ranks).kill()

    def ranks(self) -> list[psutil.Process]:
        return self.server.ranks()

    def step(self) -> None:
        """Something random, and a right picture after it."""
        what = self.random.choices(
            ["picture", "cancel", "kill between prompts", *FAULTS], [6, 3, 1, 1, 1, 1, 0.5]
        )[0]
        if what in FAULTS:
            self.fault(what)
        elif what != "picture":
            getattr(self, what.replace(" ", "_"))()
        self.done[what] += 1
        self.picture()
        assert len(self.ranks()) == 2


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    faults = tmp_path / "fault"
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TP_RUNTIME_HOME": str(tmp_path / "home"),
        "TP_RUNTIME_TEST_FAULTS": str(faults),
        "TP_RUNTIME_CALL_TIMEOUT": str(CALL_TIMEOUT_S),
    }
    with nothing_left_over(), ComfyServer(env=environment) as server:
        for seed, name in enumerate(MODELS):
            write_z_image(server.models / "diffusion_models" / name, seed=seed)
        write_lora(server.models / "loras" / LORA, LAYERS, seed=0)
        yield Soak(server, faults, seed=int(os.environ.get("SOAK_SEED", "0")))


def files_of(process: psutil.Process) -> int:
    """Open files that are no sockets: those come and go with the requests."""
    links = [str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
    return len([link for link in links if not link.startswith("socket:")])


def test_soak(soak: Soak, tmp_path: Path) -> None:
    server = psutil.Process(soak.server.process.pid)
    end = time.monotonic() + MINUTES * 60
    warm = time.monotonic() + MINUTES * 15
    before: tuple[int, int] | None = None
    soak.picture()
    while time.monotonic() < end:
        soak.step()
        if before is None and time.monotonic() > warm:
            before = server.memory_info().rss, files_of(server)
    soak.fault("raise")
    soak.picture()
    after = server.memory_info().rss, files_of(server)
    print(f"{dict(soak.done)}; memory and files of the server: {before} → {after}")
    assert before is not None
    assert after[0] <= before[0] * (1 + MAX_GROWTH)
    assert after[1] <= before[1]
    assert len(list((tmp_path / "home/groups").iterdir())) <= KEPT_FOLDERS + 1
