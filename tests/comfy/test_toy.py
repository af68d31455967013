"""The toy of `examples/shapes`, installed as a user does: its pictures show what the prompt says.

A wrong sign, time scale or position on both sides would leave equal latents, and another picture.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from examples.shapes.scenes import Scene, prompts
from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.leaks import nothing_left_over
from support.paths import TOY_PACK
from support.toy import SAMPLING, shown, toy_prompt
from support.workflows import Prompt, node, stock_twin

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(3)]

SCENES = [
    Scene("", "red", "circle", "middle", "blue"),
    Scene("large", "yellow", "triangle", "bottom left", "purple"),
    Scene("small", "white", "square", "right", "green"),
    Scene("", "black", "ring", "top", "orange"),
    Scene("large", "cyan", "cross", "top right", "pink"),
    # These go wrong first: with the time reversed, and with half the time scale.
    Scene("small", "cyan", "cross", "middle", "purple"),
    Scene("", "orange", "square", "bottom", "red"),
]

Compare = Callable[..., History]


@pytest.fixture(scope="module")
def comfy_server() -> Iterator[ComfyServer]:
    """A server with the toy's pack, and without the one of the tests."""
    env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with nothing_left_over(), ComfyServer(env=env, pack=TOY_PACK) as server:
        yield server


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: next(prompts(scene)))
def test_the_picture_shows_the_prompt(
    comfy_server: ComfyServer, same_as_stock: Compare, scene: Scene
) -> None:
    prompt = toy_prompt(next(prompts(scene)), 2)
    histories = [same_as_stock(prompt), comfy_server.run(stock_twin(prompt))]
    for history in histories:
        (picture,) = comfy_server.pictures(history)
        assert shown(picture) == scene


def test_without_guidance(comfy_server: ComfyServer, same_as_stock: Compare) -> None:
    prompt = toy_prompt("red circle on blue", 2, replace(SAMPLING, cfg=1.0))
    (picture,) = comfy_server.pictures(same_as_stock(prompt))
    assert shown(picture) == SCENES[0]


def test_the_vae_encodes(comfy_server: ComfyServer) -> None:
    prompt = stock_twin(toy_prompt("red circle on blue", 2))
    prompt["encoded"] = node("VAEEncode", pixels=["decoded", 0], vae=["vae", 0])
    prompt["decoded again"] = node("VAEDecode", samples=["encoded", 0], vae=["vae", 0])
    prompt["picture"]["inputs"]["images"] = ["decoded again", 0]
    (picture,) = comfy_server.pictures(comfy_server.run(prompt))
    assert shown(picture) == SCENES[0]
    assert "Missing VAE keys" not in comfy_server.log()


def test_the_template_runs(comfy_server: ComfyServer) -> None:
    workflow = json.loads((TOY_PACK / "example_workflows" / "shapes.json").read_text())
    (picture,) = comfy_server.pictures(comfy_server.run(_api_form(workflow)))
    assert shown(picture) == SCENES[0]


def _api_form(workflow: dict[str, Any]) -> Prompt:
    """What the page makes of a workflow of plain nodes."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for item in workflow["nodes"]:
        values = iter(item.get("widgets_values", ()))
        inputs = {}
        for field in item["inputs"]:
            name = field["name"]
            inputs[name] = next(values) if "widget" in field else sources[field["link"]]
            if name == "seed":
                next(values)  # what the page does with it after a run
        prompt[str(item["id"])] = node(item["type"], **inputs)
    return prompt


def test_an_unknown_word_is_one_clear_error(comfy_server: ComfyServer) -> None:
    with pytest.raises(PromptError, match=r"does not know 'dog'.*circle, square") as error:
        comfy_server.run(toy_prompt("red dog on blue", 2))
    assert error.value.node_id == "positive"
