"""LoRA nodes over HTTP: our MODEL with them gives what the stock model gives with them."""

from collections.abc import Callable
from typing import Any

import pytest

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.lora_files import write_lora
from support.tiny_models import tiny_shapes
from support.workflows import Prompt, Sampling, node, text_to_latent, tp_loader

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"
LAYERS = ("layers.0.attention.qkv", "layers.0.attention.out", "layers.1.feed_forward.w2")

Compare = Callable[..., History]


@pytest.fixture(scope="module")
def loras(comfy_server: ComfyServer) -> tuple[str, str]:
    """Two LoRA files, of the same layers and another one."""
    shapes = tiny_shapes("z_image")
    names = ("first.safetensors", "second.safetensors")
    for seed, name in enumerate(names):
        layers = (*LAYERS, f"noise_refiner.{seed}.feed_forward.w1")
        write_lora(
            comfy_server.models / "loras" / name,
            [(path, shapes[f"{path}.weight"]) for path in layers],
            seed=seed,
        )
    return names


def with_loras(prompt: Prompt, *chain: tuple[str, float]) -> Prompt:
    """The same prompt with LoraLoaderModelOnly nodes after the loader."""
    prompt = dict(prompt)
    model = "model"
    for index, (name, strength) in enumerate(chain):
        prompt[f"lora {index}"] = node(
            "LoraLoaderModelOnly", model=[model, 0], lora_name=name, strength_model=strength
        )
        model = f"lora {index}"
    prompt["sampler"] = {
        **prompt["sampler"],
        "inputs": {**prompt["sampler"]["inputs"], "model": [model, 0]},
    }
    return prompt


def tp_prompt(**settings: Any) -> Prompt:
    return text_to_latent(tp_loader(MODEL, 2), sampling=Sampling(**settings))


@pytest.mark.rotates(3)
@pytest.mark.parametrize(
    "strengths", [(1.0,), (-0.7,), (0.8, 0.5), (0.8, -1.2)], ids=lambda s: " ".join(map(str, s))
)
def test_model_only(
    same_as_stock: Compare, loras: tuple[str, str], strengths: tuple[float, ...]
) -> None:
    same_as_stock(with_loras(tp_prompt(), *zip(loras, strengths, strict=False)))


def test_changes_from_prompt_to_prompt(
    comfy_server: ComfyServer, same_as_stock: Compare, loras: tuple[str, str]
) -> None:
    """Another strength, another LoRA, none: each is as if it had been there from the start."""
    plain = comfy_server.latent(comfy_server.run(tp_prompt(seed=91)))
    for chain in ([(loras[0], 0.5)], [(loras[0], 0.9)], [(loras[1], 0.9)], []):
        history = same_as_stock(with_loras(tp_prompt(seed=91), *chain))
        changed = comfy_server.latent(history)
        assert bool(chain) != bool(changed.equal(plain))


def with_hooks(prompt: Prompt, lora: str, *, scheduled: bool) -> Prompt:
    """The positive conditioning carries a LoRA, which may come and go with the steps."""
    prompt = {
        **prompt,
        "hook": node("CreateHookLoraModelOnly", lora_name=lora, strength_model=0.9),
        "hooked": node(
            "ConditioningSetProperties",
            cond_NEW=["positive", 0],
            strength=1.0,
            set_cond_area="default",
            hooks=["hook", 0],
        ),
    }
    if scheduled:
        prompt["start"] = node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
        prompt["rise"] = node(
            "CreateHookKeyframe", strength_mult=1.0, start_percent=0.3, prev_hook_kf=["start", 0]
        )
        prompt["fall"] = node(
            "CreateHookKeyframe", strength_mult=-0.5, start_percent=0.7, prev_hook_kf=["rise", 0]
        )
        prompt["scheduled"] = node("SetHookKeyframes", hooks=["hook", 0], hook_kf=["fall", 0])
        prompt["hooked"]["inputs"]["hooks"] = ["scheduled", 0]
    inputs = prompt["sampler"]["inputs"] | {"positive": ["hooked", 0]}
    prompt["sampler"] = {**prompt["sampler"], "inputs": inputs}
    return prompt


@pytest.mark.rotates(3)
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_hooks(same_as_stock: Compare, loras: tuple[str, str], scheduled: bool, cfg: float) -> None:
    """With guidance, one half of every step has the LoRA and the other has not."""
    same_as_stock(with_hooks(tp_prompt(cfg=cfg, steps=6), loras[0], scheduled=scheduled))


def test_hooks_on_top_of_a_lora(same_as_stock: Compare, loras: tuple[str, str]) -> None:
    prompt = with_hooks(tp_prompt(cfg=2.0), loras[0], scheduled=True)
    same_as_stock(with_loras(prompt, (loras[1], 0.6)))


def test_nothing_is_left_of_a_cancelled_lora(
    comfy_server: ComfyServer, same_as_stock: Compare, loras: tuple[str, str]
) -> None:
    comfy_server.events.clear()
    long_run = with_loras(tp_prompt(steps=5000), (loras[0], 1.0))
    prompt_id = comfy_server.queue(long_run)
    comfy_server.events.wait_for("progress", lambda event: event.data["value"] >= 2)
    comfy_server.interrupt()
    with pytest.raises(PromptError):
        comfy_server.wait(prompt_id, timeout_s=30)
    same_as_stock(tp_prompt(seed=92))
