"""What is constant over a sampling is known to be: then no step waits until it was looked at."""

from typing import Any

import pytest

from support.comfy_server import ComfyServer
from support.workflows import Prompt, Sampling, node, tp_text_to_latent

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
