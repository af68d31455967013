"""What is constant over a sampling is known to be: then no step waits until it was looked at."""

from collections.abc import Iterator
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
