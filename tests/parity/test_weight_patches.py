"""What a patch makes of a weight, against ComfyUI's own arithmetic, bit for bit."""

from typing import Any

import comfy_kitchen as kitchen
import pytest
import torch

from support.native import import_comfy
from tp_runtime.wire.protocol import WeightPatch
from tp_runtime.wire.weight_patches import PatchError, check_fits, patched, rounded

ROWS, COLUMNS, RANK = 48, 32, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(shape, generator=generator) / 4


def lora(dora: torch.Tensor | None = None, alpha: float | None = 2.0) -> tuple[Any, ...]:
    return random(ROWS, RANK), random(RANK, COLUMNS), alpha, None, dora, None


# Name → (ComfyUI's adapter, its weights, the shape of the patched weight).
CASES: dict[str, tuple[str, tuple[Any, ...], tuple[int, ...]]] = {
    "lora": ("lora", lora(), (ROWS, COLUMNS)),
    "lora without alpha": ("lora", lora(alpha=None), (ROWS, COLUMNS)),
    "lora with mid": (
        "lora",
        (random(ROWS, RANK), random(RANK, 8), 2.0, random(RANK, RANK, 3, 3), None, None),
        (ROWS, 8, 3, 3),
    ),
    "dora of rows": ("lora", lora(1 + random(ROWS, 1)), (ROWS, COLUMNS)),
    "dora of columns": ("lora", lora(1 + random(1, COLUMNS)), (ROWS, COLUMNS)),
    "loha": (
        "loha",
        (
            *(random(ROWS, RANK), random(RANK, COLUMNS), 2.0),
            *(random(ROWS, RANK, seed=1), random(RANK, COLUMNS, seed=1), None, None, None),
        ),
        (ROWS, COLUMNS),
    ),
    "loha with cores": (
        "loha",
        (
            *(random(RANK, ROWS), random(RANK, 8), 2.0, random(RANK, ROWS, seed=1)),
            *(random(RANK, 8, seed=1), random(RANK, RANK, 3, 3), random(RANK, RANK, 3, 3), None),
        ),
        (ROWS, 8, 3, 3),
    ),
    "loha with dora": (
        "loha",
        (
            *(random(ROWS, RANK), random(RANK, COLUMNS), 2.0),
            *(random(ROWS, RANK, seed=1), random(RANK, COLUMNS, seed=1), None, None),
            1 + random(ROWS, 1),
        ),
        (ROWS, COLUMNS),
    ),
    "lokr": (
        "lokr",
        (random(4, 4), random(ROWS // 4, COLUMNS // 4), 3.0, *[None] * 6),
        (ROWS, COLUMNS),
    ),
    "lokr of factors": (
        "lokr",
        (
            *(None, None, 3.0, random(4, 2), random(2, 4)),
            *(random(ROWS // 4, RANK), random(RANK, COLUMNS // 4), None, None),
        ),
        (ROWS, COLUMNS),
    ),
    "glora": (
        "glora",
        (
            *(random(COLUMNS, RANK), random(RANK, COLUMNS)),
            *(random(ROWS, RANK), random(RANK, COLUMNS, seed=1), 2.0, None),
        ),
        (ROWS, COLUMNS),
    ),
    "older glora": (
        "glora",
        (
            *(random(RANK, COLUMNS), random(COLUMNS, RANK)),
            *(random(RANK, COLUMNS, seed=1), random(ROWS, RANK), 2.0, None),
        ),
        (ROWS, COLUMNS),
    ),
    "oft": ("oft", (random(6, 8, 8), None, None, None), (ROWS, COLUMNS)),
    "bounded oft": ("oft", (random(6, 8, 8), None, 0.5, None), (ROWS, COLUMNS)),
    "boft": ("boft", (random(2, 6, 8, 8), None, 0.0, None), (ROWS, COLUMNS)),
    "rescaled boft": ("boft", (random(1, 6, 8, 8), random(ROWS, 1), 0.5, None), (ROWS, COLUMNS)),
}


def comfys(patches: list[tuple[Any, ...]], weight: torch.Tensor) -> torch.Tensor:
    import_comfy()
    import comfy.lora

    return comfy.lora.calculate_weight(patches, weight.clone(), "key")


def adapter(kind: str, weights: tuple[Any, ...]) -> Any:
    import_comfy()
    import comfy.weight_adapter

    classes = {cls.name: cls for cls in comfy.weight_adapter.adapters}
    return classes[kind](set(), weights)


@pytest.mark.parametrize("strength", [1.0, 0.6, -1.3])
@pytest.mark.parametrize("case", CASES)
def test_adapters(case: str, strength: float) -> None:
    kind, factors, shape = CASES[case]
    weight = random(*shape, seed=9)
    expected = comfys([(strength, adapter(kind, factors), 1.0, None, None)], weight)
    assert not torch.equal(expected, weight), "ComfyUI applied nothing"
    patch = WeightPatch(kind, factors, strength)
    check_fits(patch, shape)
    assert torch.equal(patched(weight.clone(), [patch]), expected)


def test_half_precision_factors() -> None:
    kind, factors, shape = CASES["lora"]
    half = tuple(f.bfloat16() if isinstance(f, torch.Tensor) else f for f in factors)
    weight = random(*shape, seed=9)
    expected = comfys([(0.7, adapter(kind, half), 1.0, None, None)], weight)
    assert torch.equal(patched(weight.clone(), [WeightPatch(kind, half, 0.7)]), expected)


def test_plain_patches_in_their_order() -> None:
    import_comfy()
    import comfy.utils

    kind, factors, shape = CASES["lora"]
    weight, part = random(*shape, seed=9), (ROWS // 3, COLUMNS)
    diff, other = random(*shape, seed=2), random(*part, seed=3)
    third = (random(ROWS // 3, RANK), random(RANK, COLUMNS), 1.0, None, None, None)
    offset = (0, ROWS // 3, ROWS // 3)
    expected = comfys(
        [
            (0.5, (diff,), 0.8, None, None),
            (0.6, adapter(kind, factors), 1.0, None, comfy.utils.swap_scale_shift),
            (0.7, adapter(kind, third), 1.0, offset, None),
            (1.0, ("set", (other,)), 1.0, (0, 0, ROWS // 3), None),
            (0.4, ("diff", (diff,)), 0.9, None, None),
        ],
        weight,
    )
    patches = [
        WeightPatch("diff", (diff,), 0.5, 0.8),
        WeightPatch(kind, factors, 0.6, function="swap_scale_shift"),
        WeightPatch(kind, third, 0.7, offset=offset),
        WeightPatch("set", (other,), 1.0, offset=(0, 0, ROWS // 3)),
        WeightPatch("diff", (diff,), 0.4, 0.9),
    ]
    assert torch.equal(patched(weight.clone(), patches), expected)


@pytest.mark.parametrize("kind", ["lora", "diff"])
def test_a_larger_weight(kind: str) -> None:
    """Zeros are added after the strength of the weight; what is patched before is kept."""
    before, after = random(*(shape := (ROWS, COLUMNS)), seed=2), (ROWS, 2 * COLUMNS)
    up, down = random(ROWS, RANK, seed=3), random(RANK, 2 * COLUMNS, seed=4)
    factors = (up, down, 2.0, None, None, list(after))
    if kind == "diff":
        factors = (random(*after, seed=5), {"pad_weight": True})
    theirs = adapter(kind, factors) if kind == "lora" else (kind, factors)
    weight = random(*shape, seed=9)
    entries = [(0.5, (before,), 1.0, None, None), (0.7, theirs, 0.9, None, None)]
    expected = comfys(entries, weight)
    assert expected.shape == after
    patch = WeightPatch(kind, factors, 0.7, 0.9)
    assert check_fits(patch, shape) == after
    assert torch.equal(
        patched(weight.clone(), [WeightPatch("diff", (before,), 0.5), patch]), expected
    )
    for other in ((ROWS, 3 * COLUMNS), (ROWS,)):
        with pytest.raises(PatchError, match="by adding zeros"):
            check_fits(patch, other)


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (WeightPatch("lora", lora(), 1.0), "shape"),
        (WeightPatch("diff", (random(1, 16),), 1.0), r"\(1, 16\) is not \(16, 16\)"),
        (WeightPatch("oft", (random(5, 8, 8), None, None, None), 1.0), "shape"),
        (WeightPatch("boft", (random(2, 2, 8, 8), None, None, None), 1.0), "alpha"),
    ],
)
def test_what_does_not_fit(patch: WeightPatch, words: str) -> None:
    with pytest.raises(PatchError, match=words):
        check_fits(patch, (16, 16))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32]
)
def test_rounding(dtype: torch.dtype) -> None:
    import_comfy()
    import comfy.float  # whose random numbers depend on the release

    weight = random(4200, 4097, seed=1) * torch.logspace(-6, 4, 4097)
    expected = comfy.float.stochastic_rounding(weight.clone(), dtype, seed=1234)
    by_bytes = getattr(comfy.float, "_CK_STOCHASTIC_ROUNDING_AVAILABLE", False)
    found = rounded(weight.clone(), dtype, 1234, by_bytes)
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_rounding_by_bytes(dtype: torch.dtype) -> None:
    """As `comfy/float.py` of ComfyUI 0.33 does where it has comfy-kitchen."""
    weight = random(4200, 4097, seed=1) * torch.logspace(-6, 4, 4097)
    generator = torch.Generator().manual_seed(1234)
    drawn = torch.randint(0, 256, weight.size(), dtype=torch.uint8, generator=generator)
    expected = kitchen.stochastic_rounding_fp8(weight.clone(), drawn, dtype)
    found = rounded(weight, dtype, seed=1234, by_bytes=True)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
