"""The life of the process groups behind the prompts: kept, shared, released, unloaded."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support.comfy_history import History
from support.comfy_server import ComfyServer
from support.group_reports import group, groups, rank_pids
from support.tiny_models import write_tiny
from support.waiting import wait_until
from support.workflows import (
    Prompt,
    Sampling,
    node,
    tp_loader,
    tp_text_to_latent,
    with_report,
)

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"
OTHER_MODEL = "other_z_image.safetensors"

Works = Callable[[], list[int]]
Compare = Callable[..., History]


@pytest.fixture(scope="module")
def other_model(comfy_server: ComfyServer) -> Path:
    """A second file with other weights."""
    return write_tiny("z_image", comfy_server.models / "diffusion_models" / OTHER_MODEL, seed=1)


def test_second_prompt_reuses_the_group(comfy_server: ComfyServer, works: Works) -> None:
    pids = works()
    delays = []
    for seed in range(40, 45):
        comfy_server.events.clear()
        comfy_server.run(tp_text_to_latent(MODEL, sampling=Sampling(seed=seed)))
        start = comfy_server.events.wait_for("execution_start")
        first = comfy_server.events.wait_for("progress")
        assert first.data["max"] == Sampling().steps  # nothing was loaded
        delays.append(first.time_s - start.time_s)
    assert works() == pids
    shown = ", ".join(f"{delay * 1000:.0f}" for delay in delays)
    print(f"ms from the start of a prompt to its first step and preview: {shown}")


def test_equal_models_share_their_weights(comfy_server: ComfyServer, works: Works) -> None:
    """Two loaders of one file in one prompt: one set of shards."""
    pids = works()
    prompt = tp_text_to_latent(MODEL, sampling=Sampling(seed=50))
    prompt["again"] = tp_loader(MODEL, 2)
    prompt["second"] = node("TPSampler", **prompt["sampler"]["inputs"] | {"model": ["again", 0]})
    prompt["second"]["inputs"]["seed"] = 51
    prompt["saved"] = node("SaveLatent", samples=["second", 0], filename_prefix="latents/test")
    prompt = with_report(prompt, after="second")
    history = comfy_server.run(prompt)
    assert rank_pids(history) == pids
    assert [len(rank["models"]) for rank in group(history)["ranks"]] == [1, 1]


def test_two_files_in_one_prompt(
    comfy_server: ComfyServer, other_model: Path, same_as_stock: Compare, works: Works
) -> None:
    pids = works()
    prompt = tp_text_to_latent(MODEL, sampling=Sampling(seed=52))
    prompt["other"] = tp_loader(OTHER_MODEL, 2)
    prompt["second"] = node("KSampler", **prompt["sampler"]["inputs"] | {"model": ["other", 0]})
    del prompt["second"]["inputs"]["gpu_count"]
    prompt["saved"] = node("SaveLatent", samples=["second", 0], filename_prefix="latents/test")
    history = same_as_stock(prompt)
    first, second = comfy_server.latents(history).values()
    assert not first.allclose(second, atol=0.1)
    assert works() == pids


def test_a_file_replaced_by_another_is_loaded_anew(
    comfy_server: ComfyServer, other_model: Path, same_as_stock: Compare
) -> None:
    same_as_stock(tp_text_to_latent(OTHER_MODEL, sampling=Sampling(seed=53)))
    write_tiny("z_image", other_model, seed=2)
    same_as_stock(tp_text_to_latent(OTHER_MODEL, sampling=Sampling(seed=53)))


def test_tp_sampler_overrides_the_loaders_gpu_count(
    comfy_server: ComfyServer, same_as_stock: Compare, works: Works
) -> None:
    """`auto` is one rank on a machine without GPUs, next to the loader's two."""
    pids = works()
    prompt = tp_text_to_latent(MODEL, 2, Sampling(seed=54))
    prompt["sampler"]["inputs"]["gpu_count"] = "auto"
    history = same_as_stock(prompt)
    (alone,) = rank_pids(history, tp_size=1)
    assert alone not in pids
    assert [len(rank["models"]) for rank in group(history, 1)["ranks"]] == [1]
    assert works() == pids


def test_the_loader_takes_auto(same_as_stock: Compare) -> None:
    history = same_as_stock(tp_text_to_latent(MODEL, "auto", Sampling(seed=55)))
    assert len(rank_pids(history, tp_size=1)) == 1


def test_free_puts_the_weights_to_sleep_and_keeps_the_ranks(
    comfy_server: ComfyServer, works: Works
) -> None:
    pids = works()
    kept = with_report({"model": tp_loader(MODEL, 2)}, after="model")  # ComfyUI keeps the MODEL
    assert _asleep(comfy_server, kept) == [False]
    comfy_server.post("/free", {"unload_models": True})
    wait_until(lambda: _asleep(comfy_server, kept) == [True], within_s=10.0)
    assert works() == pids


def test_a_model_that_no_prompt_uses_any_more_is_unloaded(
    comfy_server: ComfyServer, works: Works
) -> None:
    pids = works()
    nothing = {"report": node("TPRuntimeInfo")}
    wait_until(lambda: _asleep(comfy_server, nothing) == [], within_s=10.0)
    assert works() == pids


def _asleep(server: ComfyServer, prompt: Prompt) -> list[bool]:
    """Of each model that rank 0 of the group of two holds when the prompt has run."""
    models = group(server.run(prompt))["ranks"][0]["models"]
    return [model["asleep"] for model in models.values()]


def test_released_groups_are_gone_and_come_back(comfy_server: ComfyServer, works: Works) -> None:
    """The node in the middle of a prompt passes its input on."""
    pids = works()
    prompt = tp_text_to_latent(MODEL, sampling=Sampling(seed=56))
    prompt["release"] = node("TPReleaseRuntime", anything=["sampler", 0])
    prompt["save"]["inputs"]["samples"] = ["release", 0]
    history = comfy_server.run(with_report(prompt, after="release"))
    assert groups(history) == []
    assert comfy_server.latent(history).shape == (1, 16, 16, 16)
    assert history.text("release").startswith("Ended ")
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))
    assert not set(works()) & set(pids)
