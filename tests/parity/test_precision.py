"""``precision="fast"`` on real ranks: 8 bits a number between them, and what that costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import Remote, relative_error
from parity.eight_bit_ranks import HEADS, STREAMS, heads, inputs
from torch.utils import _pytree as pytree

from bench.dummy import dummy_file, sizes_of
from bench.extents import Extent
from bench.inputs import make_inputs as bench_inputs
from bench.step import flat
from support.forked_ranks import start_program
from support.inputs import make_inputs
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import GroupConfig, ModelSpec, RemoteModel, Runtime
from tp_runtime.models import families, family_named
from tp_runtime.models.token_shares import dealt_out

pytestmark = pytest.mark.process

# TP size, ranks that share the tokens.
LAYOUTS = [(2, 1), (3, 1), (1, 2), (1, 3), (2, 2)]
FAMILIES = ["z_image", "flux", "qwen_image", "wan"]
# Family → what makes its inputs.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "z_image": {"height": 9, "width": 7, "length": 5, "batch": 2},
    "flux": {"height": 9, "width": 7, "length": 5, "batch": 2},
    "qwen_image": {"references": ((9, 8), (4, 6))},
    "wan": {"frames": 3, "height": 6, "width": 10, "batch": 2},
}
LIMIT = 1.5e-2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("precision")

    def write(family: str) -> Path:
        path = folder / f"{family}.safetensors"
        return path if path.exists() else write_tiny(family, path)

    return write


@pytest.fixture(scope="module")
def fast(runtime: Runtime) -> Callable[..., RemoteModel]:
    """The same file with 8 bits, on the group that ``remote`` loads it on."""

    def load(path: Path, tp_size: int, sequence_size: int) -> RemoteModel:
        spec = ModelSpec.of(str(path), "float32", "float32", precision="fast")
        model = runtime.model(spec, GroupConfig(tp_size, "cpu", (), 1, sequence_size))
        model.ensure_loaded()
        return model

    return load


@pytest.mark.rotates(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp_size", "sequence_size"), LAYOUTS)
def test_the_error_of_a_model(
    written: Callable[[str], Path],
    remote: Remote,
    fast: Callable[..., RemoteModel],
    runtime: Runtime,
    family: str,
    tp_size: int,
    sequence_size: int,
) -> None:
    """`pytest -s` shows what `docs/scaling.md` has."""
    path, found = written(family), make_inputs(tiny(family), **ARGUMENTS[family])
    exact = remote(path, tp_size, sequence_size=sequence_size)
    expected = exact.evaluate(found)
    rounding = fast(path, tp_size, sequence_size)
    error = relative_error(rounding.evaluate(found), expected)
    print(f"{family} {tp_size}x{sequence_size}: {error:.2e}")
    assert 1e-3 < error <= LIMIT
    assert torch.equal(exact.evaluate(found), expected)  # also beside the other
    (report,) = [one for one in runtime.reports() if exact.group_id == one.id]
    for rank in report.ranks:
        assert rank["models"][exact.name]["precision"] == "exact"
        assert rank["models"][rounding.name]["precision"] == "fast"


def test_one_rank_rounds_nothing(written: Callable[[str], Path], remote: Remote, fast: Any) -> None:
    path, found = written("flux"), make_inputs(tiny("flux"), **ARGUMENTS["flux"])
    assert torch.equal(fast(path, 1, 1).evaluate(found), remote(path, 1).evaluate(found))


@pytest.mark.rotates(9)
@pytest.mark.parametrize("family", sorted(families()))
def test_what_the_benchmarks_compute_shows(
    tmp_path: Path, remote: Remote, fast: Any, family: str
) -> None:
    """With their random weights, a little in every sum is as much in the result: no check of theirs
    is blind to what a block does.
    """
    path = dummy_file(family, tmp_path, small=True)
    extent = Extent(160, 96, min(Extent.usual(family_named(family))[0].frames, 9))
    given = bench_inputs(family, sizes_of(family, small=True), extent, batch=1)
    inputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.float, given)
    exact, rounded = (flat(model.evaluate(inputs)) for model in (remote(path, 2), fast(path, 2, 1)))
    assert 1e-3 < relative_error(rounded, exact) < LIMIT


@pytest.mark.rotates(7)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8])
def test_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """Sums of two streams at once, and exchanges of shares that do not divide."""
    program = Path(__file__).with_name("eight_bit_ranks.py")
    start_program(program, ranks, tmp_path, within_s=240)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    assert all(one["rounds"] for one in found)
    parts = [inputs(rank) for rank in range(ranks)]
    for stream in range(len(STREAMS)):
        expected = sum(part[stream] for part in parts) + 0.5  # the bias, once
        torch.testing.assert_close(
            found[0]["exact"]["sums"][stream], expected, equal_nan=True, rtol=1e-5, atol=1e-5
        )
        rounded = found[0]["fast"]["sums"][stream]
        for kind in (torch.isnan, torch.isinf):
            assert torch.equal(kind(rounded), kind(expected))
        there = expected.isfinite()
        assert 1e-3 < relative_error(rounded[there], expected[there]) < 1.2e-2
        for other in found[1:]:
            bits = other["fast"]["sums"][stream].view(torch.int32)
            assert torch.equal(bits, rounded.view(torch.int32))
    for one, expected in zip(found, heads().split(dealt_out(HEADS, ranks), 2), strict=True):
        assert torch.equal(one["exact"]["heads"], expected)
        if expected.numel():
            assert 1e-3 < relative_error(one["fast"]["heads"], expected) < 8e-3
        else:
            assert one["fast"]["heads"].shape == expected.shape
