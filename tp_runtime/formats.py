"""How the weight of a linear may be quantised in a file: ComfyUI's formats, as data.

Facts: ComfyUI 0.33, ``comfy/quant_ops.py`` and ``comfy/ops.py``; comfy-kitchen 0.2.31, ``tensor/``.
A *companion* is a tensor beside the weight, without which its numbers mean nothing. Companions have
one name here, whatever each format calls them in the file:

- ``weight_scale`` (rows,) fp32: multiplies the rows of the weight.
- ``block_scale`` (rows, columns / block): multiplies blocks of a row's columns.
- ``pre_quant_scale`` (linears, columns) fp32: multiplies the input of each linear that a layer
  stands for.
- ``codebook`` (linears, 16) fp32: what the four bits of each stand for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

ROTATION = 256  # columns that ConvRot rotates together, if the file does not say
# Compute capabilities of GPUs whose tensor cores multiply int8 and fp8.
INT8_SINCE, FP8_SINCE = (7, 5), (8, 9)
CODES = 16  # entries of a codebook
E4M3, E5M2, MXFP8, NVFP4 = "float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4"
INT8, W4A4, W4A8 = "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"


@dataclass(frozen=True)
class Storage:
    """How a format's tensors are stored.

    ``dtype``: what the weight's bytes are held as; ``packed``: elements of a row in one of these.
    ``companions``: name here → suffix in the file. ``optional``: those that a file may lack.
    ``block``: columns with a scale of their own. ``swizzled``: the scales of blocks lie in tiles of
    128 x 4, as cuBLAS reads them. ``rows``: there may be a scale for each row.
    """

    dtype: torch.dtype
    companions: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    packed: int = 1
    block: int = 0
    swizzled: bool = False
    rows: bool = True
    padded: int = 1  # the weight's axes may be padded to a multiple of it


_ROWS = {"weight_scale": "weight_scale"}
STORAGE: Mapping[str, Storage] = {
    E4M3: Storage(torch.float8_e4m3fn, _ROWS, rows=False),
    E5M2: Storage(torch.float8_e5m2, _ROWS, rows=False),
    MXFP8: Storage(
        torch.float8_e4m3fn, {"block_scale": "weight_scale"}, block=32, swizzled=True, padded=32
    ),
    NVFP4: Storage(
        torch.uint8,
        {
            "weight_scale": "weight_scale_2",
            "block_scale": "weight_scale",
            "pre_quant_scale": "pre_quant_scale",
        },
        optional=frozenset({"pre_quant_scale"}),
        packed=2,
        block=16,
        swizzled=True,
        rows=False,
        padded=16,
    ),
    INT8: Storage(torch.int8, _ROWS),
    W4A4: Storage(torch.int8, _ROWS, packed=2),
    W4A8: Storage(
        torch.int8,
        {
            "weight_scale": "weight_s_channel",
            "block_scale": "weight_s_rel",
            "codebook": "weight_codebook",
        },
        optional=frozenset({"codebook"}),
        packed=2,
        block=16,
    ),
}
# What else may lie beside a weight: ComfyUI's static scale of the input, for which ranks have no
# use, since they scale every token by itself.
UNUSED_COMPANIONS = ("input_scale",)


@dataclass(frozen=True)
class LayerFormat:
    """How the weight of a layer is quantised.

    ``rotation``: columns that are rotated together (ConvRot), 0 for none. ``block``: columns with a
    scale of their own, 0 for none. ``companions``: which it has. ``full_precision``: the file asks
    for products in the compute dtype. ``block_dtype``: of the scales of blocks.
    """

    name: str
    rotation: int = 0
    block: int = 0
    companions: tuple[str, ...] = ("weight_scale",)
    full_precision: bool = False
    block_dtype: torch.dtype | None = None

    @property
    def storage(self) -> Storage:
        return STORAGE[self.name]

    @property
    def group(self) -> int:
        """A row may be cut between so many columns only."""
        return math.lcm(self.rotation or 1, self.block or 1, self.storage.packed)

    @property
    def label(self) -> str:
        """As ``plan`` shows it: ``int8_tensorwise+convrot256``."""
        rotation = f"+convrot{self.rotation}" if self.rotation else ""
        smoothed = "+awq" if "pre_quant_scale" in self.companions else ""
        return f"{self.name}{rotation}{smoothed}"

    def compute(self, capability: tuple[int, int] | None, quantised_products: bool) -> str:
        """How products are computed on a GPU of that compute capability; None: on a CPU.

        ``quantised_products``: the GPU is to multiply in int8 and fp8 if it can (``config``).
        """
        integers = self.name in (INT8, W4A8, W4A4) and not self.full_precision
        if capability is None and integers:
            return "int4 products" if self.name == W4A4 else "int8 products"
        if capability is not None and quantised_products:
            if integers and capability >= INT8_SINCE:
                return "int8 products"
            if self.name == E4M3 and not self.full_precision and capability >= FP8_SINCE:
                return "fp8 products"
        return "dequantised at every use"

    def companion_shape(self, name: str, shape: tuple[int, int], linears: int = 1) -> torch.Size:
        """Of a companion of a weight of ``shape`` (rows, columns) that stands for ``linears``."""
        rows, columns = shape
        return torch.Size(
            {
                "weight_scale": (rows,),
                "block_scale": (rows, columns // self.block if self.block else 0),
                "pre_quant_scale": (linears, columns),
                "codebook": (linears, CODES),
            }[name]
        )

    def companion_dtype(self, name: str) -> torch.dtype:
        """What the ranks hold a companion in."""
        if name == "block_scale":
            assert self.block_dtype is not None
            return self.block_dtype
        return torch.float32


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight of a file that is quantised.

    ``shape``: (rows, columns) of its numbers. ``tensors``: companion → its name in the file.
    ``first_format``: it is in ComfyUI's first format with scales, which releases patch differently.
    ``one_scale``: int8 with one scale for all rows, and so again when it is patched.
    """

    format: LayerFormat
    shape: tuple[int, int]
    tensors: Mapping[str, str] = field(default_factory=dict)
    first_format: bool = False
    one_scale: bool = False
