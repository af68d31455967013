"""What is constant over a sampling is known to be: then no step waits until it was looked at."""

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.comfy_server import ComfyServer
from support.pack import pack_module
from support.workflows import Prompt, Sampling, node, tp_text_to_latent
from tp_runtime.client import ahead

pytestmark = [pytest.mark.comfy]

MODEL = "tiny_z_image.safetensors"
STEPS = 4


def known(server: ComfyServer, name: str, prompt: Prompt) -> list[str]:
    """Of each evaluation, a number for what it is known as, or `unknown`."""
    (loader,) = [key for key, of in prompt.items() if of["class_type"] == "TPLoadDiffusionModel"]
    watched = {"watch": node("TPTestKnown", model=[loader, 0], name=name)}
    for key, of in prompt.items():
        inputs = of["inputs"]
        others = {k: ["watch", 0] for k, v in inputs.items() if v == [loader, 0] and key != loader}
        watched[key] = of | {"inputs": inputs | others}
    server.run(watched)
    return (server.base / "output" / f"{name}.txt").read_text().split()


def prompts(length: int, **sampling: Any) -> Prompt:
    """Two captions, the other one so long."""
    prompt = tp_text_to_latent(MODEL, sampling=Sampling(steps=STEPS, **sampling))
    prompt["negative"]["inputs"]["length"] = length
    return prompt


def test_one_condition(comfy_server: ComfyServer) -> None:
    assert known(comfy_server, "one", prompts(24)) == STEPS * ["1"]


def test_two_conditions_in_one_batch(comfy_server: ComfyServer) -> None:
    assert known(comfy_server, "batch", prompts(24, cfg=2.5)) == STEPS * ["1"]


def test_two_conditions_one_after_the_other(comfy_server: ComfyServer) -> None:
    found = known(comfy_server, "two", prompts(40, cfg=2.5))
    assert found == STEPS * ["1", "2"]


def test_a_condition_of_some_of_the_steps(comfy_server: ComfyServer) -> None:
    """The same shapes, but another caption, from the middle on."""
    prompt = prompts(24)
    for name, start, end in (("first", 0.0, 0.5), ("second", 0.5, 1.0)):
        of = "positive" if name == "first" else "negative"
        prompt[name] = node(
            "ConditioningSetTimestepRange", conditioning=[of, 0], start=start, end=end
        )
    prompt["both"] = node(
        "ConditioningCombine", conditioning_1=["first", 0], conditioning_2=["second", 0]
    )
    prompt["sampler"]["inputs"]["positive"] = ["both", 0]
    found = known(comfy_server, "range", prompt)
    assert len(found) >= STEPS
    assert {*found} == {"1", "2"} or {*found} == {"1", "2", "3"}
    assert found == sorted(found)


def test_another_sampling_is_known_as_something_else(comfy_server: ComfyServer) -> None:
    prompt = prompts(24)
    prompt["again"] = prompt["sampler"] | {
        "inputs": prompt["sampler"]["inputs"] | {"latent_image": ["sampler", 0]}
    }
    prompt["save"]["inputs"]["samples"] = ["again", 0]
    assert known(comfy_server, "again", prompt) == STEPS * ["1"] + STEPS * ["2"]


# --- moved to the GPU once ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved_conditions() -> Iterator[Any]:
    with pack_module("nodes.moved_conditions") as module:
        yield module.moved_conditions


def conditions() -> list[Any]:
    from comfy.conds import CONDConstant, CONDCrossAttn, CONDList, CONDNoiseShape

    tensor = torch.ones(1, 2, 3)
    of = {
        "c_crossattn": CONDCrossAttn(tensor),
        "c_concat": CONDNoiseShape(tensor),
        "ref_latents": CONDList([tensor, tensor]),
        "ref_latents_method": CONDConstant("index"),
    }
    return [[{"model_conds": of, "uuid": "the first"}], None, []]


def test_conditions_are_moved_once_in_a_sampling(moved_conditions: Any) -> None:
    """Their kinds stay, and the conditions that other models are evaluated with."""
    conds, device = conditions(), torch.device("meta")
    with ahead():
        (one,), none, empty = moved_conditions(conds, device)
        (again,), *_ = moved_conditions(conds, device)
    assert (none, empty, one["uuid"]) == (None, [], "the first")
    before = conds[0][0]["model_conds"]
    for name, cond in one["model_conds"].items():
        assert again["model_conds"][name] is cond
        assert type(cond) is type(before[name])
    there = [one["model_conds"][name].cond for name in ("c_crossattn", "c_concat")]
    for tensor in (*there, *one["model_conds"]["ref_latents"].cond):
        assert (tensor.device, tensor.shape) == (device, (1, 2, 3))
    assert one["model_conds"]["ref_latents_method"].cond == "index"
    assert before["c_crossattn"].cond.device.type == "cpu"


def test_conditions_stay_where_nothing_is_ahead(moved_conditions: Any) -> None:
    conds = conditions()
    assert moved_conditions(conds, torch.device("meta")) is conds
    with ahead():
        assert moved_conditions(conds, torch.device("cpu")) is conds


def writes(cond: Any) -> None:
    cond.cond.mul_(0.5)


def writes_into_an_element(cond: Any) -> None:
    cond.cond[0][0].zero_()


def replaces_a_tensor(cond: Any) -> None:
    cond.cond = cond.cond * 0.5


def replaces_an_element(cond: Any) -> None:
    cond.cond[1] = cond.cond[1] * 0.5


def appends_an_element(cond: Any) -> None:
    cond.cond.append(torch.ones(1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("c_crossattn", writes),
        ("c_crossattn", replaces_a_tensor),
        ("ref_latents", writes_into_an_element),
        ("ref_latents", replaces_an_element),
        ("ref_latents", appends_an_element),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("inference", [True, False])
def test_a_condition_that_a_node_changes_is_moved_again(
    moved_conditions: Any, name: str, change: Callable[[Any], None], *, inference: bool
) -> None:
    """And once more only; ComfyUI moves it at every step, so the node reckons with it.

    ComfyUI samples in inference mode, whose tensors do not count what is written into them.
    """
    with torch.inference_mode(inference), ahead():
        conds, device = conditions(), torch.device("meta")
        before = conds[0][0]["model_conds"]
        before["ref_latents"].cond = [[torch.ones(2)], torch.ones(3)]

        def moved() -> dict[str, Any]:
            (entry,), *_ = moved_conditions(conds, device)
            return {name: one for name, one in entry["model_conds"].items() if name != "c_concat"}

        first = moved()
        change(before[name])
        second = moved()
        assert [key for key in first if first[key] is not second[key]] == [name]
        assert moved() == second


@pytest.mark.parametrize("device", ["meta", "cuda:0"])
def test_tensors_of_gpus_are_not_copied(moved_conditions: Any, device: str) -> None:
    """So what a node writes into them holds; another one in the place of one is another one.

    Those of another GPU than the latent's, as `meta` is of `cuda:0`, are left to ComfyUI.
    """
    from comfy.conds import CONDList

    tensor, other = torch.ones(2, device="meta"), torch.ones(2, device="meta")
    cond = CONDList([tensor])
    conds = [[{"model_conds": {"ref_latents": cond}}]]

    def moved() -> Any:
        return moved_conditions(conds, torch.device(device))[0][0]["model_conds"]["ref_latents"]

    with ahead():
        first = moved()
        assert first.cond[0] is tensor
        assert moved() is first
        cond.cond[0] = other
        assert moved().cond[0] is other


# --- as long as they are of use ------------------------------------------------------------------


def windows_of(cond: dict[str, Any], latent: torch.Tensor) -> Iterator[list[Any]]:
    """The conditions that ComfyUI's context windows make of one, at one step.

    Newer releases cut `c_concat` for each, too.
    """
    from comfy import context_windows

    handler = context_windows.IndexListContextHandler(
        context_windows.get_matching_context_schedule("standard_static"),
        context_windows.get_matching_fuse_method("pyramid"),
        context_length=4,
        context_overlap=1,
        dim=2,
    )
    handler._model = None  # whose own way with conditions newer releases ask for
    for window in handler.get_context_windows(None, latent, {}):
        (of_window,) = handler.get_resized_cond([cond], latent, window)
        concat = cond["model_conds"]["c_concat"]
        of_window["model_conds"]["c_concat"] = concat._copy_with(
            concat.cond[:, :, window.index_list]
        )
        yield [[of_window]]


def test_what_context_windows_make_goes_with_its_window(moved_conditions: Any) -> None:
    """The caption, which is one for all, is moved once."""
    from comfy.conds import CONDNoiseShape, CONDRegular

    latent, device = torch.zeros(1, 4, 10, 2, 2), torch.device("meta")
    parts = {"c_crossattn": CONDRegular(torch.ones(1, 3)), "c_concat": CONDNoiseShape(latent)}
    cond = {"model_conds": parts, "uuid": "the first"}
    captions, slices = set(), []
    with ahead(), pack_module("nodes.known_conditions") as known_conditions:
        remote: Any = object()
        keys = set()
        for _ in range(3):
            for conds in windows_of(cond, latent):
                there = moved_conditions(conds, device)
                with known_conditions.known_conditions(remote, there, {}):
                    options = {"uuids": ["the first"], "cond_or_uncond": [0]}
                    keys.add(known_conditions.known_as(remote, options))
                captions.add(there[0][0]["model_conds"]["c_crossattn"])
                for made in (conds, there):
                    one = made[0][0]["model_conds"]["c_concat"]
                    assert one is not parts["c_concat"]
                    slices += [weakref.ref(one), weakref.ref(one.cond)]
        num_windows = len(slices) // 4
        assert num_windows >= 6
        assert len(captions) == 1
        assert len(keys) == num_windows
        del conds, there, made, one
        gc.collect()
        assert not [ref for ref in slices if ref() is not None]


def test_conditions_are_known_by_what_they_hold(moved_conditions: Any) -> None:
    """Not those that a node has written into, moved to another area, or put others in the place."""
    from comfy.conds import CONDCrossAttn

    text = torch.ones(1, 2, 3)
    entry: dict[str, Any] = {"model_conds": {"c_crossattn": CONDCrossAttn(text)}, "uuid": 1}
    remote = SimpleNamespace()

    with ahead(), pack_module("nodes.known_conditions") as known_conditions:

        def known(entry: dict[str, Any]) -> Any:
            there = moved_conditions([[entry]], torch.device("meta"))
            with known_conditions.known_conditions(remote, there, {}):
                return known_conditions.known_as(remote, {"uuids": [1], "cond_or_uncond": [0]})

        first = known(entry)
        assert known(entry) == first
        assert known(dict(entry)) == first, "the same conditions in another dictionary"
        in_area = known(entry | {"area": (8, 8, 0, 0)})
        assert in_area != first
        assert known(entry | {"area": [8, 8, 0, 0]}) == in_area
        text.mul_(0.5)
        second = known(entry)
        assert second != first
        assert known(entry) == second
        entry["model_conds"]["c_crossattn"] = CONDCrossAttn(text)
        assert known(entry) not in (first, second)
