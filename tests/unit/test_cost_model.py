"""The cost model: what must hold whatever its constants are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench.scaling import (
    CODED_SUMS_WITHOUT_PEERS,
    STEPS_OF_H100S,
    SUMS_WITHOUT_PEERS,
    VIDEO_BLOCKS,
    Case,
    video_blocks,
)
from tp_runtime.config import Layout
from tp_runtime.layouts.cost_model import (
    CODED,
    DEVICES,
    LINKS,
    REQUEST_S,
    Link,
    Prediction,
    coded_sum_s,
    device_of,
    layouts,
    nccl_s,
    predict,
    predict_blocks,
)
from tp_runtime.layouts.step_history import Workload
from tp_runtime.models import families, family_named
from tp_runtime.sharding.block_costs import BlockCosts, count_flops

MODELS = sorted(families())
SHARING = sorted(name for name, family in families().items() if family.shares_tokens)


def predicted(
    model: str, tp_size: int, batch_groups: int = 1, batch: int = 1, side: int = 1024, **more: Any
) -> Prediction:
    sizes = family_named(model).published
    shape = batch, *sizes.geometry.latent_shape(side, side)
    layout = Layout(tp_size, batch_groups, more.pop("sequence_size", 1))
    return predict(sizes, Workload(shape, 512), layout, **more)


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
    assert device_of("NVIDIA GeForce RTX 4090") is DEVICES["RTX 4090"]
    pro = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"
    assert device_of(pro) is DEVICES["RTX PRO 6000"]
    assert device_of("NVIDIA L40S") is None


@pytest.mark.parametrize(("tokens", "link", "layout", "seconds"), VIDEO_BLOCKS)
def test_measured_blocks_that_share_tokens(
    tokens: int, link: Link, layout: Layout, seconds: float
) -> None:
    sizes = layout.tp_size, layout.sequence_size
    found = predict_blocks(video_blocks(tokens), 1, *sizes, DEVICES["H100"], link)
    assert found.ms / 1e3 == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(("size", "ms"), SUMS_WITHOUT_PEERS.items())
def test_measured_sums_without_peer_access(size: int, ms: float) -> None:
    assert 1e3 * nccl_s(28 * 2**20, size, LINKS["pcie5-host"]) == pytest.approx(ms, rel=0.12)


@pytest.mark.parametrize(("size", "ms"), CODED_SUMS_WITHOUT_PEERS.items())
def test_measured_sums_in_8_bits(size: int, ms: float) -> None:
    found = coded_sum_s(28 * 2**20, size, DEVICES["H100"], LINKS["pcie5-host"])
    assert 1e3 * found == pytest.approx(ms, rel=0.12)


@pytest.mark.parametrize("model", SHARING)
@pytest.mark.parametrize(("tp_size", "sequence_size"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_8_bits_halve_what_a_slow_link_carries(
    model: str, tp_size: int, sequence_size: int
) -> None:
    link = replace(LINKS["pcie-host"], rate=1e6, exchange_rate=1e6)
    of = {"sequence_size": sequence_size, "link": link}
    exact, fast = (predicted(model, tp_size, **of, precision=each) for each in ("exact", "fast"))
    # What is once an evaluation goes as it is.
    assert CODED < fast.links / exact.links < 1.1 * CODED
    assert (fast.matmul, fast.attention) == (exact.matmul, exact.attention)
    assert fast.elementwise >= exact.elementwise
    assert fast.fixed > exact.fixed


@pytest.mark.parametrize("model", MODELS)
def test_8_bits_change_nothing_over_nvlink_or_on_one_gpu(model: str) -> None:
    assert predicted(model, 4, precision="fast") == predicted(model, 4)
    host = LINKS["pcie-host"]
    assert predicted(model, 1, link=host, precision="fast") == predicted(model, 1, link=host)


@pytest.mark.parametrize(("case", "ms"), STEPS_OF_H100S.items(), ids=str)
def test_measured_steps_of_h100s(case: Case, ms: float) -> None:
    """With NVLink, and without peer access."""
    assert case.predict().ms == pytest.approx(ms, rel=0.1)


@pytest.mark.parametrize("model", SHARING)
def test_sharing_tokens_divides_the_arithmetic_only(model: str) -> None:
    one, four = (predicted(model, 1, sequence_size=size, side=2048) for size in (1, 4))
    assert 0.25 * one.matmul <= four.matmul < 0.4 * one.matmul
    assert 0.25 * one.attention <= four.attention < 0.3 * one.attention
    assert four.links > one.links == 0
    slow = replace(LINKS["nvlink"], exchange_rate=1.0)
    assert predicted(model, 1, sequence_size=2, link=slow).links > 1e6
    assert predicted(model, 2, link=slow) == predicted(model, 2)


def test_an_exchange_by_hand() -> None:
    """Per block and GPU, Ulysses moves 4 (S-1)/S² of tokens x width; a sum 2 (T-1)/T of it."""
    tokens, width = 75_600, 5120
    link = replace(LINKS["pcie"], rate=1.0, exchange_rate=1.0)
    for size in (2, 4, 8):
        found = predict_blocks(video_blocks(tokens), 1, 1, size, DEVICES["H100"], link)
        moved = 2 * 4 * (size - 1) / size**2 * tokens * width
        assert found.links / 1e3 / 40 == pytest.approx(moved, rel=1e-3)
        found = predict_blocks(video_blocks(tokens), 1, size, 1, DEVICES["H100"], link)
        moved = 2 * 2 * 2 * (size - 1) / size * tokens * width
        assert found.links / 1e3 / 40 == pytest.approx(moved, rel=1e-3)


def test_the_caption_is_not_exchanged() -> None:
    """Of Wan's, every rank has the keys; its own tokens look at them with all heads."""
    (block,) = family_named("wan").published.table.block_costs(512, 32_760)
    to_tokens, to_text = block.attentions
    assert (to_tokens.passing, to_text.passing) == (32_760, 0)
    of = (1, 1, 4, DEVICES["H100"], LINKS["pcie"])
    both = predict_blocks(replace(block, attentions=(to_tokens, to_text)), *of)
    one = predict_blocks(replace(block, attentions=(to_tokens,)), *of)
    assert both.links == one.links
    assert both.attention > one.attention


def test_keys_that_queries_share_are_exchanged_once() -> None:
    """Krea 2's 12 for 48 queries; on 8 GPUs, where they do not divide, one with each query."""
    (block,) = blocks_of("krea2")
    link = replace(LINKS["pcie"], exchange_rate=1.0)
    moved = {
        size: predict_blocks(block, 1, 1, size, DEVICES["H100"], link).links * size**2 / (size - 1)
        for size in (4, 8)
    }
    assert moved[8] / moved[4] == pytest.approx(4 / 2.5, rel=1e-3)


def test_layouts_of_a_number_of_gpus() -> None:
    sizes = family_named("z_image").published
    assert list(map(str, layouts(sizes, 4))) == ["4x1", "2x2", "1x4"]
    assert list(map(str, layouts(sizes, 4, shares_tokens=True))) == [
        *("4x1", "2x2", "1x4"),
        *("2x2x1", "1x2x2"),
        "1x4x1",
    ]
