"""Which weights of a model file are quantised, and how, in each of ComfyUI's ways to say so.

A *plain* fp8 file has no scales and needs nothing of this. The others:

- *scaled*: a marker tensor ``scaled_fp8``; ``X.scale_weight`` beside ``X.weight``.
- *described*: the file's metadata ``_quantization_metadata`` names the layers and their formats, or
  each has a tensor ``X.comfy_quant`` (JSON as bytes) that does. A layer that is not described is
  plain, so files may be mixed. ``formats.py`` says what lies beside a weight.

A file may be both: layers with a ``scale_weight`` are scaled then, the others as they are
described. With the metadata the marker means nothing (``convert_old_quants`` in
``comfy/utils.py`` of ComfyUI 0.33).
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from ..formats import (
    CODES,
    E4M3,
    E5M2,
    INT8,
    MXFP8,
    ROTATION,
    STORAGE,
    UNUSED_COMPANIONS,
    W4A4,
    W4A8,
    LayerFormat,
    QuantisedWeight,
)
from .safetensors_file import DTYPES, TensorInfo

METADATA = "_quantization_metadata"
MARKER = "scaled_fp8"
_MAX_DESCRIPTION = 2**16  # bytes
_SHOWN_LAYERS = 5
_FLOATS = ("F64", "F32", "F16", "BF16")
# As what else a file may store the bytes of a dtype.
_ALIASES = {"U8": ("F8_E4M3", "F8_E5M2", "I8", "F8_E8M0"), "I8": ("U8",)}


def find_quantised(
    path: str,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    read: Callable[[str], torch.Tensor],
    prefix: str = "",
) -> tuple[dict[str, QuantisedWeight], set[str]]:
    """The quantised weights by name; and the names of all tensors that serve for them.

    ``tensors`` and ``metadata`` are the whole header's; ``read`` reads a tensor. ``prefix``: what
    the file's names, and so perhaps its metadata's, have before those of ``tensors``. What only
    linears can have is left out where it stands beside another weight, as ComfyUI does.

    Raises:
        CheckpointError: a format that is not known, or a tensor that is missing or misshaped.
    """
    described = _descriptions(path, tensors, metadata, read, prefix)
    unknown = {layer: str(d["format"]) for layer, d in described.items()}
    unknown = {layer: name for layer, name in unknown.items() if name not in STORAGE}
    if unknown:
        raise CheckpointError(
            f"The model file {path} is quantised in a way that cannot be split yet: "
            f"{_some(f'layer {layer} has the format {name!r}' for layer, name in unknown.items())}."
            f" Supported: {', '.join(STORAGE)}. Choose another file of this model, or load it with "
            "the stock 'Load Diffusion Model' node."
        )
    found: dict[str, QuantisedWeight] = {}
    extra = {MARKER}
    for layer, description in described.items():
        layer_format, names = _format_of(path, layer, description, tensors)
        if not _is_of_another_kind(layer, tensors):
            found[f"{layer}.weight"] = _checked(path, layer, layer_format, names, tensors)
        extra |= {*names.values(), f"{layer}.comfy_quant"}
        extra |= {f"{layer}.{name}" for name in UNUSED_COMPANIONS}
    if MARKER in tensors and METADATA not in metadata:
        scaled, more = _scaled(path, tensors)
        found, extra = found | scaled, extra | more
    return found, extra & tensors.keys()


def _scaled(
    path: str, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, QuantisedWeight], set[str]]:
    layers = [n.removesuffix(".scale_weight") for n in tensors if n.endswith(".scale_weight")]
    exact = tensors[MARKER].num_elements == 2
    found = {}
    for layer in layers:
        if _is_of_another_kind(layer, tensors):
            continue
        stored = tensors.get(f"{layer}.weight")
        name = E5M2 if stored is not None and stored.dtype == "F8_E5M2" else E4M3
        names = {"weight_scale": f"{layer}.scale_weight"}
        layer_format = LayerFormat(name, full_precision=exact)
        found[f"{layer}.weight"] = _checked(
            path, layer, layer_format, names, tensors, first_format=True
        )
    extra = {f"{x}.{kind}" for x in layers for kind in ("scale_weight", "scale_input")}
    return found, extra


def _is_of_another_kind(layer: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a layer is no linear: a convolution, or a norm."""
    weight = tensors.get(f"{layer}.weight")
    return weight is not None and len(weight.shape) != 2


def _descriptions(
    path: str,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    read: Callable[[str], torch.Tensor],
    prefix: str,
) -> dict[str, dict[str, Any]]:
    """Layer → what the file says of it, of the layers that the diffusion model has."""
    described: dict[str, Any] = {}
    try:
        if METADATA in metadata:
            described |= json.loads(metadata[METADATA])["layers"]
        for name, tensor in tensors.items():
            if name.endswith(".comfy_quant"):
                if tensor.dtype != "U8" or tensor.num_elements > _MAX_DESCRIPTION:
                    raise ValueError(f"{name} has {tensor.num_elements} {tensor.dtype}")
                text = read(name).numpy().tobytes()
                described[name.removesuffix(".comfy_quant")] = json.loads(text)
        named = {_without_prefix(layer, prefix): dict(what) for layer, what in described.items()}
        # A full checkpoint's metadata also describes its text encoders.
        here = {layer: what for layer, what in named.items() if f"{layer}.weight" in tensors}
        for layer, what in here.items():
            if not isinstance(what["format"], str):
                raise TypeError(f"the format of {layer} is {what['format']!r}")
            nested = what.get("params")
            here[layer] = (nested if isinstance(nested, dict) else {}) | what
        return here
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise CheckpointError(
            f"The model file {path} does not say in a readable way how it is quantised "
            f"({type(error).__name__}: {error}). Download it again."
        ) from error


def _format_of(
    path: str, layer: str, description: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[LayerFormat, dict[str, str]]:
    """The format that a layer's description gives, and its companions' names in the file."""
    name = description["format"]
    storage = STORAGE[name]
    names = {here: f"{layer}.{suffix}" for here, suffix in storage.companions.items()}
    names = {
        here: stored
        for here, stored in names.items()
        if stored in tensors or here not in storage.optional
    }
    rotated = name in (W4A4, W4A8) or (name == INT8 and bool(description.get("convrot")))
    rotation = _size(path, layer, description, "convrot_groupsize", ROTATION) if rotated else 0
    block, block_dtype = storage.block, None
    if name == W4A8:
        block = _size(path, layer, description, "group_size", block)
    if "block_scale" in storage.companions:
        block_dtype = torch.float8_e8m0fnu if name == MXFP8 else torch.float8_e4m3fn
        scales = tensors.get(names["block_scale"])
        if name == W4A8 and scales is not None and scales.dtype == "F32":
            block_dtype = torch.float32
    exact = bool(description.get("full_precision_matrix_mult"))
    return LayerFormat(name, rotation, block, tuple(names), exact, block_dtype), names


def _size(path: str, layer: str, description: Mapping[str, Any], key: str, default: int) -> int:
    size = description.get(key, default)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= 2**16:
        raise CheckpointError(
            f"The model file {path} says that {layer} has the {key} {size!r}, which is no size. "
            "Download it again."
        )
    return size


def _checked(
    path: str,
    layer: str,
    layer_format: LayerFormat,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    first_format: bool = False,
) -> QuantisedWeight:
    """Raises CheckpointError unless the weight and its companions are there and fit together."""
    storage, weight = layer_format.storage, f"{layer}.weight"

    def refused(problem: str, what_to_do: str = "Download it again.") -> CheckpointError:
        return CheckpointError(
            f"The model file {path} does not hold {layer} as {layer_format.name} weights are "
            f"stored: {problem}. {what_to_do}"
        )

    for here, name in {"weight": weight, **names}.items():
        if name not in tensors:
            what = "its numbers" if here == "weight" else f"the scales {name} of {weight}"
            raise refused(f"the file lacks {what}")
    stored = tensors[weight]
    if not _is(stored, storage.dtype) or len(stored.shape) != 2:
        other = "Choose another file, or load it with the stock 'Load Diffusion Model' node."
        raise refused(f"{weight} is {stored.dtype} {list(stored.shape)}", other)
    rows, columns = stored.shape[0], stored.shape[1] * storage.packed
    for what, group in {
        "ConvRot's group": layer_format.rotation,
        "block": layer_format.block,
    }.items():
        if group and columns % group:
            raise refused(f"the {what} of {group} columns does not divide its {columns} columns")
    rotation = layer_format.rotation
    if rotation and (rotation < 4 or 4 ** round(math.log(rotation, 4)) != rotation):
        raise refused(f"ConvRot's group of {rotation} columns is no power of 4")
    for here, name in names.items():
        allowed = _companion_shapes(layer_format, here, rows, columns)
        info = tensors[name]
        # A scale of blocks may be tiled in any shape of the right size.
        tiled = here == "block_scale" and storage.swizzled
        if not (info.num_elements == math.prod(allowed[0]) if tiled else info.shape in allowed):
            raise refused(
                f"{name} has the shape {list(info.shape)}; "
                f"{' or '.join(str(list(shape)) for shape in allowed)} is needed"
            )
        dtypes = {DTYPES.get(info.dtype)} if info.dtype in _FLOATS else set()
        if not dtypes and not (
            here == "block_scale" and _is(info, layer_format.companion_dtype(here))
        ):
            raise refused(f"{name} is stored as {info.dtype}")
    one_scale = layer_format.name == INT8 and tensors[names["weight_scale"]].shape == ()
    return QuantisedWeight(layer_format, (rows, columns), dict(names), first_format, one_scale)


def _companion_shapes(
    layer_format: LayerFormat, name: str, rows: int, columns: int
) -> tuple[tuple[int, ...], ...]:
    """The shapes in which a file may store a companion."""
    storage = layer_format.storage
    if name == "weight_scale":
        scalar: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
        if layer_format.name in (W4A4, W4A8):
            return ((rows,),)
        return (*scalar, (rows, 1), (rows,)) if storage.rows else scalar
    if name == "block_scale":
        blocks = columns // layer_format.block
        if storage.swizzled:
            return ((-(-rows // 128) * 128, -(-blocks // 4) * 4),)
        return ((rows, blocks),)
    return ((columns,),) if name == "pre_quant_scale" else ((CODES,),)


def companion_values(weight: QuantisedWeight, name: str, stored: torch.Tensor) -> torch.Tensor:
    """A companion as the ranks hold it (``formats.py``), from what the file has."""
    rows, columns = weight.shape
    layer_format = weight.format
    dtype = layer_format.companion_dtype(name)
    if name == "weight_scale":
        return stored.to(dtype).reshape(-1).expand(rows)
    if name in ("codebook", "pre_quant_scale"):  # of one linear
        return stored.to(dtype).reshape(1, -1)
    if name == "block_scale" and stored.dtype.itemsize == dtype.itemsize:
        stored = stored.view(dtype)
        return (
            tiles_to_rows(stored, rows, columns // layer_format.block)
            if (layer_format.storage.swizzled)
            else stored
        )
    return stored.to(dtype)


def tiles_to_rows(scales: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """(rows, blocks) of scales that lie in tiles of 128 rows x 4 blocks, padded.

    The layout is cuBLAS's: https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout.
    In a tile, row 32·i + j comes j-th, as the i-th of four stretches of 4.
    """
    across, down = -(-blocks // 4), -(-rows // 128)
    tiles = scales.reshape(down, across, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :blocks]


def _is(info: TensorInfo, dtype: torch.dtype) -> bool:
    """Whether a tensor holds what are, byte for byte, numbers of ``dtype``."""
    return DTYPES.get(info.dtype) == dtype or any(
        DTYPES[name] == dtype for name in _ALIASES.get(info.dtype, ())
    )


def _without_prefix(name: str, prefix: str) -> str:
    name = name.removeprefix(prefix)
    return name.removeprefix("model.").removeprefix("diffusion_model.")


def _some(problems: Any) -> str:
    problems = list(problems)
    more = len(problems) - _SHOWN_LAYERS
    return ", ".join(problems[:_SHOWN_LAYERS]) + (f" and {more} more" if more > 0 else "")
