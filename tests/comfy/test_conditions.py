"""Conditions of different lengths on batch groups: at the same time, but for other people's code.

ComfyUI's sampling is real; the ranks are not started.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tp_runtime.client import GroupConfig, RemoteModel

pytestmark = pytest.mark.comfy

STEPS = 2


class Seen:
    """What other people's code sees: how often it is called, by which threads, and when."""

    def __init__(self) -> None:
        self.orders: list[list[int]] = []
        self.threads: set[threading.Thread] = set()
        self.times = 0

    def note(self, conditions: Sequence[int] = ()) -> None:
        self.times += 1
        self.threads.add(threading.current_thread())
        self.orders.append([*conditions])


@pytest.fixture
def patcher(unstarted: Callable[..., Any], tiny_z_image: Path) -> Any:
    """A MODEL on two batch groups that need not be started."""
    return unstarted(tiny_z_image, GroupConfig(1, "cpu", batch_groups=2))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many evaluations each request is of; the ranks would answer as much as they are given."""
    found: list[int] = []

    def evaluate_all(_: RemoteModel, inputs: Sequence[Any], *__: Any, **___: Any) -> list[Any]:
        found.append(len(inputs))
        return [one["x"] for one in inputs]

    monkeypatch.setattr(RemoteModel, "evaluate_all", evaluate_all)
    return found


def sample(patcher: Any) -> None:
    """With two captions, the second one longer."""
    import comfy.sample

    positive, negative = ([[torch.ones(1, length, 2560), {}]] for length in (5, 9))
    noise = torch.ones(1, 16, 8, 8)
    comfy.sample.sample(
        patcher, noise, STEPS, 2.0, "euler", "normal", positive, negative, torch.zeros_like(noise)
    )


def by_function(patcher: Any, seen: Seen) -> None:
    def function(apply_model: Any, given: dict[str, Any]) -> Any:
        seen.note(given["cond_or_uncond"])
        return apply_model(given["input"], given["timestep"], **given["c"])

    patcher.set_model_unet_function_wrapper(function)


def by_wrapper(kind: str) -> Callable[[Any, Seen], None]:
    def add(patcher: Any, seen: Seen) -> None:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            (options,) = (
                one for one in (*args, *kwargs.values()) if isinstance(one, dict) and "uuids" in one
            )
            seen.note(options["cond_or_uncond"])
            return executor(*args, **kwargs)

        patcher.add_wrapper_with_key(kind, "test", wrapper)

    return add


def test_they_are_evaluated_at_the_same_time(patcher: Any, asked: list[int]) -> None:
    sample(patcher)
    assert asked == STEPS * [2]


@pytest.mark.parametrize(
    "add",
    [by_function, by_wrapper("apply_model"), by_wrapper("diffusion_model")],
    ids=["function", "apply_model", "diffusion_model"],
)
def test_code_of_nodes_is_called_for_one_after_the_other(
    patcher: Any, asked: list[int], add: Callable[[Any, Seen], None]
) -> None:
    """By the sampler's thread, in ComfyUI's order: it may keep account of them."""
    seen = Seen()
    add(patcher, seen)
    sample(patcher)
    assert seen.threads == {threading.current_thread()}
    assert seen.orders == STEPS * [[0], [1]]
    assert asked == 2 * STEPS * [1]


def test_a_step_is_prepared_for_once(patcher: Any, asked: list[int]) -> None:
    seen = Seen()
    patcher.add_callback_with_key("on_prepare_state", "test", lambda *_: seen.note())
    sample(patcher)
    assert seen.times == STEPS
    assert asked == 2 * STEPS * [1]
