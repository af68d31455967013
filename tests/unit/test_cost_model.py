"""The cost model: what must hold whatever its constants are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tp_runtime.layouts.cost_model import (
    DEVICES,
    LINKS,
    REQUEST_S,
    Prediction,
    device_of,
    predict,
)
from tp_runtime.models import families, family_named
from tp_runtime.sharding.block_costs import BlockCosts, count_flops

MODELS = sorted(families())


def predicted(
    model: str, tp_size: int, batch_groups: int = 1, batch: int = 1, side: int = 1024, **more: Any
) -> Prediction:
    sizes = family_named(model).published
    shape = batch, *sizes.geometry.latent_shape(side, side)
    return predict(sizes, shape, 512, tp_size, batch_groups, **more)


def blocks_of(model: str, image: int = 4096, text: int = 512) -> list[BlockCosts]:
    sizes = family_named(model).published
    return sizes.table.block_costs(sizes.geometry.padded(text), sizes.geometry.padded(image))


@pytest.mark.parametrize("model", MODELS)
def test_one_gpu_does_not_communicate(model: str) -> None:
    assert predicted(model, 1).links == 0
    slow = replace(LINKS["nvlink"], rate=1.0)
    assert predicted(model, 1, link=slow) == predicted(model, 1)
    assert predicted(model, 2, link=slow).ms > 1e6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("batch", "groups", "of_one"), [(2, 2, 1), (3, 2, 2), (5, 4, 2), (4, 2, 2), (1, 4, 1)]
)
def test_the_fullest_group_sets_the_time(model: str, batch: int, groups: int, of_one: int) -> None:
    assert predicted(model, 2, groups, batch) == predicted(model, 2, 1, of_one)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "grow",
    [
        lambda model, factor: predicted(model, 2, batch=factor),
        lambda model, factor: predicted(model, 2, side=512 * factor),
        lambda model, factor: predicted(
            model, 2, link=replace(LINKS["nvlink"], rate=LINKS["nvlink"].rate / factor)
        ),
        lambda model, factor: predicted(
            model, 2, device=replace(DEVICES["H200"], matmul=1e15 / factor)
        ),
    ],
    ids=["batch", "side", "slower link", "slower matmul"],
)
def test_more_work_takes_longer(model: str, grow: Callable[[str, int], Prediction]) -> None:
    times = [grow(model, factor).ms for factor in (1, 2, 4)]
    assert times == sorted(set(times))


@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallelism_divides_the_arithmetic_only(model: str) -> None:
    one, two, eight = (predicted(model, size) for size in (1, 2, 8))
    assert 0.5 * one.matmul <= two.matmul < 0.6 * one.matmul
    assert 0.5 * one.attention <= two.attention < 0.6 * one.attention
    # Each GPU moves 2 (T-1)/T of the same bytes: seven quarters of two GPUs' on eight.
    assert 1.5 * two.links < eight.links < 1.75 * two.links
    assert eight.fixed == one.fixed > 1e3 * REQUEST_S


def test_padding_is_counted() -> None:
    """Z-Image's 30 heads are 32 on 4 and on 8 GPUs, 30 on 5."""
    (_, layers) = blocks_of("z_image")
    qkv = {size: layers.linears[0].local(size)[1] * size for size in (1, 2, 4, 5, 8)}
    assert qkv == {1: 90 * 128, 2: 90 * 128, 4: 96 * 128, 5: 90 * 128, 8: 96 * 128}
    heads = replace(layers.attentions[0].heads, count=32)
    assert heads.local_count(4) == layers.attentions[0].heads.local_count(4)


def test_a_products_operations() -> None:
    """By hand, for FLUX.1 at 1024²: 12 squares of the width per token and block, and attention."""
    tokens, width, blocks = 4096 + 512, 3072, 19 + 38
    assert count_flops(blocks_of("flux")) == blocks * (
        2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    )


def test_sums_without_shared_memory_are_one_for_each_stream() -> None:
    """And the residual and the norm are then computed for all rows on every GPU."""
    nccl = replace(LINKS["nvlink"], fused=False)
    for model in MODELS:
        fused, separate = predicted(model, 4), predicted(model, 4, link=nccl)
        assert separate.links > fused.links
        assert separate.elementwise > fused.elementwise
        assert separate.matmul == fused.matmul


def test_tokens() -> None:
    assert family_named("flux").published.geometry.image_tokens((16, 128, 128)) == 4096
    assert family_named("qwen_image").published.geometry.image_tokens((16, 1, 63, 65)) == 32 * 33
    with_reference = predicted("flux", 2, references=[(1, 16, 128, 128)])
    assert predicted("flux", 2).ms < with_reference.ms < 3 * predicted("flux", 2).ms


def test_a_reference_that_is_computed_once_is_only_looked_at() -> None:
    """Qwen-Image-2.1 at 1024²: 66 TFLOP, and 76 with a picture, of which it needs the keys."""
    model, text, picture = "qwen_image_21", 300, 64 * 64
    assert count_flops(blocks_of(model, 4096, text)) == pytest.approx(66e12, rel=0.02)
    assert count_flops(blocks_of(model, 4096, text + picture)) == pytest.approx(76e12, rel=0.02)
    with_reference = predicted(model, 2, references=[(1, 64, 64, 64)])
    assert with_reference.matmul == predicted(model, 2).matmul
    assert with_reference.attention > 1.7 * predicted(model, 2).attention


def test_devices_by_torchs_name() -> None:
    assert device_of("NVIDIA H200") is DEVICES["H200"]
    assert device_of("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert device_of("NVIDIA GeForce RTX 4090") is DEVICES["other"]
