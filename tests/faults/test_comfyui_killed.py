"""`kill -9` of a real ComfyUI at random moments: its ranks are gone soon each time.

Once, in a phase that the commit chooses, or as often as `KILLS` says, in all phases (`make kills`:
fifty times). The next ComfyUI starts while the one of before lives and dies.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import psutil
import pytest
from faults.cases import case
from faults.conftest import Observe, put

from support.comfy_server import NO_GPU, ComfyServer
from support.leaks import Footprint, assert_nothing_added
from support.rotation import NO_COMMIT, chosen
from support.waiting import wait_until
from support.workers import stalled_s
from support.workflows import Sampling, tp_text_to_latent
from tp_runtime.client.launch.group_folder import KEPT_FOLDERS

PHASES = ("start", "load", "evaluate", "idle", "sleep", "unload")
KILLS = int(os.environ.get("KILLS", "1"))
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.timeout(600 + 120 * KILLS),
    pytest.mark.rotates(3, "random moments"),
]

MODELS = ("one.safetensors", "two.safetensors")
ROW = case("any", "ComfyUI is killed")
START_S = 20.0  # or less; what comes after the start is a random moment, too
READY_S = 300.0  # until the phase is reached, which is not what is measured
LONG_S = 2.0


class Life:
    """A ComfyUI that has started, and how to bring its group into a phase."""

    def __init__(self, home: Path, model: Path, number: int) -> None:
        self.faults = home / f"fault{number}"
        env = NO_GPU | {
            "TP_RUNTIME_HOME": str(home),
            "TP_RUNTIME_TEST_FAULTS": str(self.faults),
        }
        self.server = ComfyServer(env=env)
        for name in MODELS:
            (self.server.models / "diffusion_models" / name).symlink_to(model)

    def reach(self, phase: str, random: Random) -> None:
        """Return at a random moment of the phase."""
        server = self.server
        if phase == "start":
            server.queue(tp_text_to_latent(MODELS[0]))
            wait_until(lambda: bool(server.children()), within_s=READY_S)
            time.sleep(random.uniform(0, START_S))
        elif phase == "evaluate":
            server.queue(tp_text_to_latent(MODELS[0], sampling=Sampling(steps=5000)))
            server.events.wait_for(
                "progress", lambda event: event.data["max"] == 5000, timeout_s=READY_S
            )
            time.sleep(random.uniform(0, LONG_S))
        elif phase == "idle":
            server.run(tp_text_to_latent(MODELS[0]))
            time.sleep(random.uniform(0, LONG_S))
        else:
            if phase != "load":
                server.run(tp_text_to_latent(MODELS[0]))
            put(self.faults, rank=1, point=phase, action="delay", delay_s=LONG_S)
            if phase == "sleep":
                server.free_until(lambda: not self.faults.exists())
            else:
                server.queue(tp_text_to_latent(MODELS[1]))
            wait_until(lambda: not self.faults.exists(), within_s=READY_S)
            time.sleep(random.uniform(0, LONG_S))

    def kill(self) -> float:
        """Kill ComfyUI alone; after how many seconds none of its processes was left."""
        children = self.server.children()
        assert children
        began = time.monotonic()
        self.server.kill()
        _, left = psutil.wait_procs(children, timeout=stalled_s(ROW.bound_s))
        assert not left
        return time.monotonic() - began


def lives(home: Path, model: Path) -> Iterator[Life]:
    """One ComfyUI after the other; each is cleaned up after when the next is taken."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(Life, home, model, 0)
        try:
            for number in range(1, KILLS + 1):
                life = coming.result()
                if number < KILLS:
                    coming = pool.submit(Life, home, model, number)
                try:
                    yield life
                finally:
                    life.server.stop()
        finally:
            coming.result().server.stop()


def test_at_any_moment(
    tmp_path: Path, tiny_z_image: Path, observe: Observe, pytestconfig: pytest.Config
) -> None:
    random = Random(0)
    first = PHASES.index(chosen(PHASES, "kill", pytestconfig.option.rotate or NO_COMMIT))
    before = Footprint.now()
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    with contextlib.closing(lives(tmp_path, tiny_z_image)) as each:
        for number, life in enumerate(each):
            phase = PHASES[(first + number) % len(PHASES)]
            life.reach(phase, random)
            seconds[phase].append(life.kill())
            assert_nothing_added(before, within_s=stalled_s(ROW.bound_s))
            print(f"{phase}: {seconds[phase][-1]:.2f} s", flush=True)
    for phase, found in seconds.items():
        if found:
            print(f"{phase}: {len(found)} kills, {min(found):.2f} to {max(found):.2f} s")
    every = [found for times in seconds.values() for found in times]
    print(f"all: median {statistics.median(every):.2f} s, {max(every):.2f} s at most")
    observe(ROW, max(every))
    assert len(list((tmp_path / "groups").iterdir())) <= KEPT_FOLDERS + 1
