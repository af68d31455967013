"""A real ComfyUI, random prompts and faults: the right picture or the right error, each time.

Twenty seconds long, or as long as `SOAK_MINUTES` says (`make soak`: thirty), but STEPS at least.
`SOAK_SEED` chooses what happens; when, and so what it meets, differs from run to run.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from faults.conftest import put
from process.conftest import assert_ended

from support.comfy_history import PromptError
from support.comfy_server import NO_GPU, ComfyServer
from support.leaks import SERVER_MARK, is_marked, nothing_left_over
from support.lora_files import write_lora
from support.tiny_models import write_tiny
from support.usage import Usage
from support.waiting import wait_until
from support.workflows import Prompt, Sampling, node, stock_twin, text_to_latent, tp_loader
from tp_runtime.client.launch.group_folder import KEPT_FOLDERS

MINUTES = float(os.environ.get("SOAK_MINUTES", str(20 / 60)))
STEPS = 12  # fewer say nothing of what grows
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.timeout(MINUTES * 60 + 900),
    pytest.mark.rotates(3, "random moments"),
]

MODELS = ("one.safetensors", "two.safetensors")
LORA = "lora.safetensors"
LAYERS = [("layers.0.attention.out", (480, 480)), ("layers.1.attention.qkv", (1440, 480))]
SEEDS = (7, 8, 9)
DEATH_S = 5.0  # of one rank, until all of them are gone
TOLERANCE = 1e-5  # of the standard deviation
PROMPT_S = 180.0
CALL_TIMEOUT_S = 20
ERRORS = {
    "die": "GroupDiedError",
    "raise": "RankError",
    "allocate": "RankMemoryError",
    "stop": "CallTimeoutError",
}
POINTS = ("start", "load", "idle", "sleep", "unload")


class Soak:
    """The server, what it should answer, and what has been done to it."""

    def __init__(self, server: ComfyServer, faults: Path, seed: int) -> None:
        self.server = server
        self.faults = faults
        self.random = Random(seed)
        self.done: Counter[str] = Counter()
        self.usages: list[Usage] = []
        self._references: dict[str, torch.Tensor] = {}
        self._last = (MODELS[0], 0)

    # --- prompts ---------------------------------------------------------------------------------

    def prompt(self, steps: int = 2, *, of_other_model: bool = False) -> Prompt:
        """A random one, of another seed than the last: ComfyUI would run nothing again."""
        last_model, last_seed = self._last
        models = [name for name in MODELS if not of_other_model or name != last_model]
        model = self.random.choice(models)
        seed = self.random.choice([seed for seed in SEEDS if seed != last_seed])
        self._last = model, seed
        prompt = text_to_latent(tp_loader(model, 2), sampling=Sampling(seed=seed, steps=steps))
        if self.random.random() < 0.5:
            prompt["lora"] = node(
                "LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=0.5
            )
            prompt["sampler"]["inputs"]["model"] = ["lora", 0]
        return prompt

    def make_references(self) -> None:
        """What the stock nodes make of every prompt that there is."""
        while len(self._references) < len(MODELS) * len(SEEDS) * 2:
            prompt = self.prompt()
            if repr(prompt) not in self._references:
                history = self.server.run(stock_twin(prompt), PROMPT_S)
                self._references[repr(prompt)] = self.server.latent(history)

    def check(self, prompt: Prompt, *may_end_in: str) -> str:
        """Run it: the picture is right, or the error one of these. Says which of them it was."""
        try:
            history = self.server.run(prompt, PROMPT_S)
        except PromptError as error:
            kind = error.type.rpartition(".")[2]
            if error.node_id == "sampler" and kind in may_end_in:
                return kind
            raise
        found, expected = self.server.latent(history), self._references[repr(prompt)]
        assert (found - expected).abs().max() / expected.std() <= TOLERANCE
        return "right"

    def picture(self) -> None:
        assert self.check(self.prompt()) == "right"

    # --- what may happen -------------------------------------------------------------------------

    def cancel(self) -> str:
        self.server.events.clear()
        prompt_id = self.server.queue(self.prompt(steps=5000))
        self.server.events.wait_for("progress", lambda e: e.data["max"] == 5000, PROMPT_S)
        time.sleep(self.random.uniform(0, 1))
        self.server.interrupt()
        with pytest.raises(PromptError) as caught:
            self.server.wait(prompt_id, PROMPT_S)
        assert caught.value.type == "interrupted"
        return ""

    def fault_in_a_step(self) -> str:
        action = self.random.choices(list(ERRORS), [1, 1, 1, 0.5])[0]
        put(self.faults, rank=self.random.randrange(2), point="evaluate", action=action)
        assert self.check(self.prompt(), ERRORS[action]) == ERRORS[action]
        assert not self.faults.exists()
        return action

    def fault_elsewhere(self) -> str:
        """Where nobody may wait for the request, or another one does."""
        point = self.random.choice(POINTS)
        action = self.random.choice(("die", "raise", "allocate"))
        if point == "start":
            self.kill()
        put(self.faults, rank=self.random.randrange(2), point=point, action=action)
        if point == "sleep":
            self.server.free_until(lambda: not self.faults.exists())
        elif point == "idle":
            ranks = self.server.ranks()
            wait_until(lambda: not self.faults.exists())
            self.all_end(ranks)  # or the prompt may be sent to a rank that is about to fail
        # Weights of a model that no node holds any more are freed in the background, or to make
        # room for the next prompt's, which is its own request.
        prompt = self.prompt(of_other_model=point in ("load", "unload"))
        own = {"start": ["GroupStartError"], "load": [ERRORS[action]], "unload": [ERRORS[action]]}
        outcome = self.check(prompt, *own.get(point, ()))
        if self.faults.exists():
            self.faults.unlink()
            outcome = "not reached"
        return f"{point}: {outcome}"

    def kill(self) -> None:
        """A rank, or the process that they were forked from, whatever it does: all ranks end."""
        ranks = self.server.ranks()
        servers = [child for child in self.server.children() if is_marked(child, SERVER_MARK)]
        if ranks:
            self.random.choice([*ranks, *servers]).kill()
            self.all_end(ranks)

    @staticmethod
    def all_end(ranks: list[psutil.Process]) -> None:
        """Whoever reaps them: where their fork server was killed, that is not ours to do."""
        assert_ended([rank.pid for rank in ranks], DEATH_S)

    def kill_between_prompts(self) -> str:
        self.kill()
        return ""

    def kill_during_a_prompt(self) -> str:
        with self.meanwhile(self.kill):
            return self.check(self.prompt(), "GroupDiedError", "GroupStartError")

    def press_a_button(self) -> str:
        """Of the page, while a prompt runs."""
        (group,) = self.server.get("/tensor_parallel/groups")["groups"]
        action = self.random.choice(("sleep", "wake", "restart", "release"))
        ends = ("GroupClosedError",) if action in ("restart", "release") else ()
        path = f"/tensor_parallel/groups/{group['id']}/{action}"
        with self.meanwhile(lambda: self.server.post(path, timeout_s=PROMPT_S)):
            return f"{action}: {self.check(self.prompt(), *ends)}"

    @contextmanager
    def meanwhile(self, act: Callable[[], None]) -> Iterator[None]:
        """At a random moment of the body; both are over afterwards."""
        errors: list[BaseException] = []
        delay_s = self.random.uniform(0, 1)

        def run() -> None:
            time.sleep(delay_s)
            try:
                act()
            except BaseException as error:  # noqa: BLE001  it is raised where the test runs
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join(PROMPT_S)
        if errors:
            raise errors[0]

    def step(self) -> None:
        """Something random, and a right picture after it."""
        happen = {
            self.picture: 6,
            self.cancel: 3,
            self.fault_in_a_step: 3,
            self.fault_elsewhere: 3,
            self.kill_between_prompts: 1,
            self.kill_during_a_prompt: 2,
            self.press_a_button: 2,
        }
        (what,) = self.random.choices(list(happen), list(happen.values()))
        outcome = what()
        self.done[f"{what.__name__} {outcome or ''}".strip()] += 1
        self.picture()
        self.usages.append(Usage.of(self.server))


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    faults = tmp_path / "fault"
    environment = NO_GPU | {
        "TP_RUNTIME_HOME": str(tmp_path / "home"),
        "TP_RUNTIME_TEST_FAULTS": str(faults),
        "TP_RUNTIME_CALL_TIMEOUT": str(CALL_TIMEOUT_S),
    }
    with nothing_left_over(), ComfyServer(env=environment) as server:
        for seed, name in enumerate(MODELS):
            write_tiny("z_image", server.models / "diffusion_models" / name, seed=seed)
        write_lora(server.models / "loras" / LORA, LAYERS, seed=0)
        yield Soak(server, faults, seed=int(os.environ.get("SOAK_SEED", "0")))


def of_server(counts: dict[int, int]) -> int:
    return next(iter(counts.values()))


def of_ranks(counts: dict[int, int]) -> int:
    """Of the rank that has most; the server and the fork server come first."""
    return max(list(counts.values())[2:])


Measure = Callable[[Usage], int]
# What may not grow. Allocators keep some memory, and ComfyUI its history; a file or a thread may be
# there for a moment.
MEASURES: dict[str, tuple[Measure, float, int]] = {
    "processes": (lambda usage: len(usage.rss), 0, 0),
    "memory of the server": (lambda usage: of_server(usage.rss), 0.05, 0),
    "memory of a rank": (lambda usage: of_ranks(usage.rss), 0.05, 0),
    "files of the server": (lambda usage: of_server(usage.files), 0, 2),
    "files of a rank": (lambda usage: of_ranks(usage.files), 0, 2),
    "threads of the server": (lambda usage: of_server(usage.threads), 0, 2),
    "threads of a rank": (lambda usage: of_ranks(usage.threads), 0, 2),
    # It is as large as the largest request so far, and doubles to become larger.
    "shared memory": (lambda usage: usage.shared, 1, 0),
}


def assert_flat(usages: Sequence[Usage]) -> None:
    """The most of the last quarter is that of the second; the first one warms up."""
    quarter = len(usages) // 4
    assert quarter, "too few steps to say anything"
    early, late = usages[quarter : 2 * quarter], usages[-quarter:]
    grown = []
    for name, (measure, share, number) in MEASURES.items():
        before, after = max(map(measure, early)), max(map(measure, late))
        print(f"{name}: {before} → {after}")
        if after > before * (1 + share) + number:
            grown.append(name)
    assert not grown


def test_soak(soak: Soak, tmp_path: Path) -> None:
    soak.make_references()
    soak.picture()
    end = time.monotonic() + MINUTES * 60
    try:
        while time.monotonic() < end or len(soak.usages) < STEPS:
            soak.step()
    finally:
        print(f"{len(soak.usages)} steps, each with a right picture after it:")
        for what, count in sorted(soak.done.items()):
            print(f"  {count:4} {what}")
    assert_flat(soak.usages)
    assert len(list((tmp_path / "home/groups").iterdir())) <= KEPT_FOLDERS + 1
