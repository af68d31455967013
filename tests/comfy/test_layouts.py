"""Batch groups behind stock samplers: the same pictures, and `auto` that learns from the steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.comfy_history import History, PromptError
from support.comfy_server import NO_GPU, ComfyServer
from support.group_reports import groups
from support.leaks import nothing_left_over
from support.tiny_models import write_tiny
from support.workflows import Prompt, Sampling, node, tp_text_to_latent
from tp_runtime.config import Layout
from tp_runtime.layouts.step_history import MIN_TIMES, USUAL_STEPS, StepRecords, Workload

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(5)]

MODEL = "tiny_z_image.safetensors"
BATCH_TOLERANCE = 1e-4  # as in test_samplers

Compare = Callable[..., History]


def with_layout(layout: str, gpu_count: str, sampling: Sampling, negative: int = 20) -> Prompt:
    prompt = tp_text_to_latent(MODEL, "from model", sampling)
    prompt["model"]["inputs"] |= {"layout": layout, "gpu_count": gpu_count}
    prompt["negative"]["inputs"]["length"] = negative
    return prompt


def sizes_of(history: History) -> list[tuple[int, int]]:
    return [(group["tp_size"], group["batch_groups"]) for group in groups(history)]


@pytest.mark.parametrize(
    ("layout", "gpu_count", "size"),
    [("1x2", "auto", (1, 2)), ("2x1", "2", (2, 1)), ("2x2", "4", (2, 2))],
)
def test_cfg(same_as_stock: Compare, layout: str, gpu_count: str, size: tuple[int, int]) -> None:
    """Texts of one length share a batch, which is divided; others are evaluated together."""
    equal = with_layout(layout, gpu_count, Sampling(cfg=2.5))
    assert size in sizes_of(same_as_stock(equal, BATCH_TOLERANCE))
    same_as_stock(with_layout(layout, gpu_count, Sampling(cfg=2.5), negative=40))


def test_three_latents_on_two_groups(same_as_stock: Compare) -> None:
    same_as_stock(with_layout("1x2", "2", Sampling(batch_size=3)), BATCH_TOLERANCE)


def test_areas_with_texts_of_different_lengths(same_as_stock: Compare) -> None:
    """Each condition is of several parts, evaluated one after the other."""
    prompt = with_layout("1x2", "2", Sampling(cfg=2.5), negative=40)
    area = {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 0.7}
    prompt["area"] = node("ConditioningSetArea", conditioning=["positive", 0], **area)
    prompt["both"] = node(
        "ConditioningCombine", conditioning_1=["area", 0], conditioning_2=["positive", 0]
    )
    prompt["sampler"]["inputs"]["positive"] = ["both", 0]
    same_as_stock(prompt, BATCH_TOLERANCE)


def test_a_cancel_ends_what_is_evaluated_together(
    comfy_server: ComfyServer, same_as_stock: Compare
) -> None:
    prompt = with_layout("1x2", "2", Sampling(cfg=2.5, steps=5000), negative=40)
    comfy_server.events.clear()
    prompt_id = comfy_server.queue(prompt)
    comfy_server.events.wait_for("progress", lambda event: event.data["max"] == 5000)
    comfy_server.interrupt()
    with pytest.raises(PromptError) as caught:
        comfy_server.wait(prompt_id)
    assert caught.value.type == "interrupted"
    same_as_stock(with_layout("1x2", "2", Sampling(cfg=2.5, seed=8), negative=40))


def test_layout_and_gpu_count_must_agree(comfy_server: ComfyServer) -> None:
    with pytest.raises(PromptError) as caught:
        comfy_server.run(with_layout("2x2", "2", Sampling()))
    assert caught.value.node_id == "model"
    assert "layout=2x2 takes 4 GPUs" in caught.value.message
    assert "Set gpu_count to 4 or 'auto'" in caught.value.message


def test_auto_follows_the_steps_that_were_measured(tmp_path: Path) -> None:
    environment = {**NO_GPU, "TP_RUNTIME_HOME": str(tmp_path)}
    book = tmp_path / "step_records.json"
    sampling = Sampling(cfg=2.5, steps=MIN_TIMES)
    workload = Workload((2, 16, 16, 16), sampling.caption_length)
    with nothing_left_over(), ComfyServer(env=environment) as server:
        path = str(write_tiny("z_image", server.models / "diffusion_models" / MODEL))
        before = StepRecords(book)
        for _ in range(MIN_TIMES):
            before.add(path, "cpu", workload, Layout(2), 1e6)
            before.add(path, "cpu", workload, Layout(1, 2), 1e5)
        before.save()

        history = server.run(with_layout("auto", "2", sampling))
        assert sizes_of(history) == [(1, 2)]
        assert "'auto' takes the layout 1x2" in server.log_path.read_text()
        single = with_layout("auto", "2", replace(sampling, cfg=1.0, steps=USUAL_STEPS))
        assert (1, 2) in sizes_of(server.run(single))  # until now there were two conditions
        again = with_layout("auto", "2", replace(sampling, cfg=1.0, seed=8))
        assert sizes_of(server.run(again)) == [(2, 1)]  # and the group that nobody uses has ended
    after = StepRecords(book)
    assert after.times(path, "cpu", workload)[Layout(1, 2)] < 1e5
    assert after.usual_workload(path, "cpu") == Workload((1, 16, 16, 16), sampling.caption_length)
