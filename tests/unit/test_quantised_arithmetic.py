"""Products, values and new roundings of quantised weights: comfy-kitchen's, bit by bit."""

from typing import Any

import comfy_kitchen as kitchen
import pytest
import torch
from comfy_kitchen.tensor import int8_utils

from support.quantised_files import FORMATS, ROTATION, as_held
from tp_runtime.files.quantised import tiles_to_rows
from tp_runtime.formats import INT8, W4A4, W4A8, QuantisedWeight
from tp_runtime.gpu.rotation import hadamard, rotated
from tp_runtime.rank.quantised_arithmetic import dequantised, product
from tp_runtime.rank.requantising import requantised
from tp_runtime.wire.protocol import PatchedWeight

ROWS, COLUMNS, SEED = 48, 128, 1234


def quantised(name: str, values: torch.Tensor) -> tuple[QuantisedWeight, dict[str, torch.Tensor]]:
    """A weight as a file has it, read as the ranks do."""
    return as_held(*FORMATS[name][0](values))


def expected_product(
    name: str, weight: QuantisedWeight, tensors: dict[str, torch.Tensor], x: Any, bias: Any
) -> torch.Tensor:
    """By comfy-kitchen's own eager functions."""
    form = weight.format
    if form.name == INT8:
        scale = tensors["weight_scale"].contiguous()
        rotation = form.rotation
        found = kitchen.int8_linear(
            x, tensors["weight"], scale, bias, x.dtype, rotation > 0, rotation or 256
        )
    elif form.name == W4A4:
        found = kitchen.convrot_w4a4_linear(
            x, tensors["weight"], tensors["weight_scale"], bias, ROTATION
        )
    else:
        assert form.name == W4A8
        codebook = tensors["codebook"][0] if "codebook" in tensors else None
        found = kitchen.w4a8_int8_linear(
            x,
            tensors["weight"],
            tensors["block_scale"],
            tensors["weight_scale"],
            codebook,
            bias=bias,
            convrot_groupsize=ROTATION,
            out_dtype=x.dtype,
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["int8", "int8_scalar", "int8_convrot", "w4a4", "w4a8", "w4a8_plain"]
)
def test_products_of_integers(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, tensors = quantised(name, torch.randn(ROWS, COLUMNS))
    x, bias = torch.randn(2, 7, COLUMNS).to(dtype), torch.randn(ROWS).to(dtype)
    found = product(weight.format, tensors, x, bias, [ROWS], of_integers=True)
    expected = expected_product(name, weight, tensors, x, bias)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["int8", "int8_convrot", "w4a4", "w4a8", "w4a8_plain"])
def test_products_with_dequantised_integers(name: str) -> None:
    """The input is rotated in the weight's place: the same but for rounding."""
    torch.manual_seed(0)
    weight, tensors = quantised(name, torch.randn(ROWS, COLUMNS))
    x, bias = torch.randn(2, 7, COLUMNS), torch.randn(ROWS)
    found = product(weight.format, tensors, x, bias, [ROWS], of_integers=False)
    values = dequantised(weight.format, tensors, torch.float32, [ROWS])
    torch.testing.assert_close(found, torch.nn.functional.linear(x, values, bias))


def test_sums_beyond_fp32_are_exact() -> None:
    torch.manual_seed(0)
    weight, tensors = quantised("int8", torch.ones(16, 4096))
    x = torch.ones(3, 4096) + 0.01 * torch.rand(3, 4096)
    expected = expected_product("int8", weight, tensors, x, None)
    assert torch.equal(product(weight.format, tensors, x, None, [16], of_integers=True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_values(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    values = torch.randn(ROWS, COLUMNS)
    weight, tensors = quantised(name, values)
    found = dequantised(weight.format, tensors, dtype)
    stored, _ = FORMATS[name][0](values)
    if name == "mxfp8":
        scale = stored["weight_scale"].view(torch.float8_e8m0fnu)
        expected = kitchen.dequantize_mxfp8(stored["weight"], scale, dtype)
    elif name.startswith("nvfp4"):
        whole, blocks = stored["weight_scale_2"], stored["weight_scale"]
        expected = kitchen.dequantize_nvfp4(stored["weight"], whole, blocks, dtype)
    elif name == "w4a4":
        expected = kitchen.dequantize_convrot_w4a4_weight(
            stored["weight"], stored["weight_scale"], ROTATION, output_dtype=dtype
        )
    elif name.startswith("w4a8"):
        expected = kitchen.dequantize_w4a8_int8_weight(
            stored["weight"],
            stored["weight_s_rel"].view(torch.float8_e4m3fn),
            stored["weight_s_channel"],
            stored.get("weight_codebook"),
            convrot_groupsize=ROTATION,
            output_dtype=dtype,
        )
    else:
        expected = stored["weight"].float() * stored["weight_scale"].float()
        if weight.format.rotation:
            group = weight.format.rotation
            matrix = int8_utils._build_hadamard(group)
            expected = int8_utils._rotate_weight(expected, matrix, group)
        expected = expected.to(dtype)
    assert torch.equal(found[:ROWS], expected[:ROWS])  # rows may be padded


@pytest.mark.parametrize(
    "name", ["int8", "int8_scalar", "int8_convrot", "mxfp8", "w4a4", "w4a8", "w4a8_plain"]
)
def test_new_roundings(name: str) -> None:
    """Of a patched weight, with the seed that ComfyUI would take."""
    torch.manual_seed(2)
    weight, tensors = quantised(name, torch.randn(ROWS, COLUMNS))
    values = torch.randn(ROWS, COLUMNS)
    found = requantised(weight, values.clone(), tensors, PatchedWeight(SEED, ()))
    if name == "int8_scalar":
        codes, scale = kitchen.quantize_int8_tensorwise(values, stochastic_rounding=SEED)
    elif name == "int8":
        codes, scale = kitchen.quantize_int8_rowwise(values, stochastic_rounding=SEED)
    elif name == "int8_convrot":
        codes, scale = kitchen.quantize_int8_rowwise(
            int8_utils._rotate_weight(values, int8_utils._build_hadamard(ROTATION), ROTATION),
            stochastic_rounding=SEED,
        )
    elif name == "mxfp8":  # comfy/float.py of 0.33
        _, tiles = kitchen.quantize_mxfp8(values, pad_32x=True)
        scales = kitchen.from_blocked(tiles.view(torch.uint8), ROWS, COLUMNS // 32)
        assert torch.equal(found["block_scale"].view(torch.uint8), scales)
        generator = torch.Generator().manual_seed(SEED)
        padded = -(-ROWS // 32) * 32, COLUMNS  # ComfyUI draws for these
        drawn = torch.randint(0, 256, padded, dtype=torch.uint8, generator=generator)[:ROWS]
        exact = values / 2.0 ** (scales.repeat_interleave(32, dim=1).float() - 127)
        codes = kitchen.stochastic_rounding_fp8(exact, drawn, torch.float8_e4m3fn)
        assert torch.equal(found["weight"].view(torch.uint8), codes.view(torch.uint8))
        return
    elif name == "w4a4":
        codes, scale = kitchen.quantize_convrot_w4a4_weight(
            values, ROTATION, stochastic_rounding=SEED
        )
    else:
        codebook = tensors["codebook"][0] if "codebook" in tensors else None
        codes, blocks, scale, _, _ = kitchen.quantize_w4a8_int8_weight(
            values,
            16,
            ROTATION,
            codebook=codebook is not None,
            codebook_tensor=codebook,
            stochastic_rounding=SEED,
        )
        assert torch.equal(found["block_scale"].float(), blocks.float())
    assert torch.equal(found["weight"], codes)
    assert torch.equal(found["weight_scale"], scale.reshape(-1).expand(ROWS))


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp8"])
def test_new_roundings_are_unbiased_and_near(name: str) -> None:
    """ComfyUI's own numbers of these are among the stored references (tests/parity)."""
    torch.manual_seed(3)
    weight, tensors = quantised(name, torch.randn(ROWS, COLUMNS))
    values = torch.randn(ROWS, COLUMNS)
    step = 0.13 if name != "nvfp4" else 0.9
    for seed in (1, 2):
        found = dequantised(
            weight.format,
            requantised(weight, values.clone(), tensors, PatchedWeight(seed, ())),
            torch.float32,
        )
        assert (found - values).abs().max() <= step * values.abs().max()
        assert (found - values).mean().abs() <= 0.02


@pytest.mark.parametrize("size", [4, 16, 256])
def test_the_rotation_is_its_own_inverse(size: int) -> None:
    matrix = hadamard(size, torch.float32, torch.device("cpu"))
    assert torch.equal(matrix, int8_utils._build_hadamard(size))
    x = torch.randn(3, 2 * size)
    torch.testing.assert_close(rotated(rotated(x, size), size), x)


@pytest.mark.parametrize(("rows", "blocks"), [(128, 4), (300, 10), (5, 3)])
def test_tiles_of_scales(rows: int, blocks: int) -> None:
    scales = torch.randint(0, 255, (rows, blocks), dtype=torch.uint8)
    tiled = kitchen.to_blocked(scales, flatten=False)
    assert torch.equal(tiles_to_rows(tiled, rows, blocks), scales)
