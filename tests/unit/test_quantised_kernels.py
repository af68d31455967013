"""Which kernel multiplies in int8 or fp8: the first that a GPU computes right with."""

from typing import Any

import pytest
import torch

from tp_runtime.gpu import quantised_products
from tp_runtime.gpu.quantised_products import (
    by_cutlass,
    by_int_mm,
    by_scaled_mm,
    first_right,
    kernels_for,
)

CPU = torch.device("cpu")


def given(tokens: int, *, bias: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(tokens)
    codes, weight = (
        torch.randint(-127, 128, (size, 96), dtype=torch.int8, generator=generator)
        for size in (tokens, 48)
    )
    scales = torch.rand(tokens, 1, generator=generator), torch.rand(1, 48, generator=generator)
    return codes, weight, *scales, torch.randn(48) if bias else None


@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_torchs_product_of_integers(tokens: int, bias: bool) -> None:
    """With few tokens, too, of which cuBLAS takes no fewer than 17."""
    codes, weight, x_scale, scale, added = given(tokens, bias=bias)
    found = by_int_mm(codes, weight, x_scale, scale, added, torch.float32)
    expected = (codes.double() * x_scale) @ (weight.double() * scale.t()).t()
    if added is not None:
        expected += added
    assert found.shape == (tokens, 48)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)


def missing(*_: Any) -> torch.Tensor:
    raise RuntimeError("Int8 not supported on SM120.")


def absent(*_: Any) -> torch.Tensor:
    raise NotImplementedError("no kernel for this GPU")


def wrong(*given: Any) -> torch.Tensor:
    return 1.1 * by_int_mm(*given)


def test_the_first_that_works(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    kernels = (missing, absent, wrong, by_int_mm)
    assert first_right(kernels, torch.int8, CPU) is by_int_mm
    assert "missing in torch.int8 on cpu: Int8 not supported on SM120." in caplog.text
    assert "wrong in torch.int8 on cpu: wrong results" in caplog.text


def test_results_in_fp16_have_a_kernel_of_their_own() -> None:
    """Wan's: torch multiplies fp8 with scales of rows to bf16 only."""

    def of_bf16(*given: Any) -> torch.Tensor:
        if given[-1] != torch.bfloat16:
            raise RuntimeError("bf16 only")
        return by_int_mm(*given)

    kernels = of_bf16, by_int_mm
    assert first_right(kernels, torch.int8, CPU) is of_bf16
    assert first_right(kernels, torch.int8, CPU, torch.float16) is by_int_mm
    fp8 = torch.float8_e4m3fn
    assert by_scaled_mm in kernels_for(fp8, torch.bfloat16)
    assert kernels_for(fp8, torch.float16) == (by_cutlass,)


def test_none_works(caplog: pytest.LogCaptureFixture) -> None:
    assert first_right((missing, wrong), torch.int8, CPU) is None
    assert "weights are dequantised at every use" in caplog.text


def test_what_is_no_refusal_is_raised() -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise TypeError("an argument too many")

    with pytest.raises(TypeError):
        first_right((broken,), torch.int8, CPU)


def test_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a short caption, some of the ranks that share it have none."""
    monkeypatch.setattr(quantised_products, "_kernel", lambda *_: pytest.fail("it was called"))
    weight, scale = torch.zeros(48, 32, dtype=torch.int8), torch.ones(48)
    found = quantised_products.product(torch.empty(1, 0, 32), weight, scale, torch.ones(48))
    assert found.shape == (1, 0, 48)
