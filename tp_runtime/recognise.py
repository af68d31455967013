"""What a model file is, from its header: its family, sizes and tensors."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .config import Layout
from .errors import CheckpointError, InputError, SizeError
from .files.checkpoint import CheckpointFile
from .files.diffusers_folder import CONFIG, FileNames
from .files.quantised import METADATA as QUANTIZATION
from .files.quantised import find_quantised
from .files.safetensors_file import DTYPES, TensorInfo
from .formats import E4M3, E5M2, QuantisedWeight
from .models import families, family_named
from .models.family import Family, Settings, Sizes, UntoldError, blocks
from .models.inputs import checked_inputs
from .models.model_patch import ModelPatch
from .models.others import OTHERS
from .sharding.parts import Shape
from .sharding.table import Table

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SHOWN_NAMES = 5


@dataclass(frozen=True)
class CheckpointInfo:
    """What a model file is, from its header.

    ``tensors`` are the model's own, with the shapes of their numbers; ``quantised``: those that are
    quantised, and how. ``metadata`` is the file's, without what it says of quantisation.
    ``quantised_bytes``: of the quantised weights, with all that serves for them. ``extra``: tensors
    that the architecture has not; nothing is computed with them. ``prefix``: what the
    file has before the names; what has another one, in a full checkpoint, is not the model's.
    """

    path: str
    family: Family
    sizes: Sizes
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    quantised: Mapping[str, QuantisedWeight] = field(repr=False)
    quantised_bytes: int = 0
    extra: Mapping[str, TensorInfo] = field(repr=False, default_factory=dict)
    prefix: str = ""

    @property
    def label(self) -> str:
        return self.family.label

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())

    def held_itemsize(self, itemsize: int | None = None) -> int:
        """Bytes of a number as ranks hold the weights that are not quantised, if they are told
        ``itemsize``; None: if they are not told. Beside quantised ones, none is held in fp8.
        """
        if itemsize is None or (self.quantised and itemsize == 1):
            is_fp8 = any(tensor.dtype.startswith("F8") for tensor in self.tensors.values())
            return 1 if is_fp8 and not self.quantised else 2
        return itemsize

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the weights in a dtype of ``itemsize`` bytes; quantised ones stay so."""
        plain = self.tensors.keys() - self.quantised.keys()
        return self.quantised_bytes + itemsize * sum(self.tensors[x].num_elements for x in plain)

    def bytes_of(self, weights: Iterable[str], itemsize: int) -> int:
        """The same of these weights alone; of quantised ones without their scales.

        What the file has not counts nothing.
        """
        return sum(
            _bytes(self.tensors[name])
            if name in self.quantised
            else itemsize * self.tensors[name].num_elements
            for name in weights
            if name in self.tensors
        )

    def checked_inputs(
        self, inputs: Mapping[str, Any], compute_dtype: str, sizes: Sizes | None = None
    ) -> Mapping[str, Any]:
        """What the model computes with. Raises InputError; see ``models/inputs.py``.

        ``sizes``: of the model as patches make it; None: as it is in the file.
        """
        return checked_inputs(self.label, sizes or self.sizes, inputs, compute_dtype)

    def widened(self, name: str, shape: Shape) -> Sizes:
        """The sizes of the model when a patch has made that weight larger.

        Raises:
            InputError: the family's models do not take that, or it is quantised in such a way.
        """
        able, before = self.family.widens, list(self.tensors[name].shape)
        quantised = self.quantised.get(name)
        found = self.sizes.with_shape(name, shape) if name == able else None
        if found is None:
            fixed = f"more columns of '{able}' only" if able else "no other shapes than its file's"
            why = f"{self.label} takes {fixed}"
        elif quantised is not None and quantised.format.name not in (E4M3, E5M2):
            why = f"In this file it is quantised ({quantised.format.label}), which must be fp8 then"
        else:
            return found
        raise InputError(
            f"A LoRA makes the weight '{name}' larger ({before} to {list(shape)}). {why}. Remove "
            "that LoRA, or load this model with the stock 'Load Diffusion Model' node."
        )

    def check_tp_size(self, tp_size: int) -> None:
        """Raises SizeError if the model cannot be split over ``tp_size`` ranks."""
        self.sizes.table.plan.check_tp_size(tp_size, self.label)

    def check_layout(self, layout: Layout) -> None:
        """Raises SizeError if the model cannot be divided that way."""
        self.check_tp_size(layout.tp_size)
        if layout.sequence_size > 1 and not self.family.shares_tokens:
            able = ", ".join(one.label for one in families().values() if one.shares_tokens)
            raise SizeError(
                f"The layout {layout} has {layout.sequence_size} GPUs share the tokens, which "
                f"{self.label} cannot yet. Choose a layout of TP size x batch groups, such as "
                f"{Layout(layout.num_gpus)}. Models that can: {able}."
            )

    def model_patch_shapes(
        self, comfyui_model: str, found: Mapping[str, Shape]
    ) -> dict[str, Shape]:
        """Of a model patch's tensors, the shapes of those that ranks compute with.

        ``comfyui_model``: ComfyUI's class of it, one of the family's ``model_patches``; ``found``:
        the shapes of its tensors.

        Raises:
            InputError: they are not all there, or those of a patch for other models.
        """
        kind = self.family.model_patch(comfyui_model)
        try:
            patch = kind.of_tensors(found)
        except KeyError as error:
            raise InputError(
                f"The {kind.label} has no tensor {error}. Download its file again, or load another."
            ) from error
        patch.check_fits(self.label, self.sizes)
        shapes = patch.table.file_tensors
        for name, shape in shapes.items():
            if found.get(name) != shape:
                raise InputError(
                    f"The tensor {name} of the {kind.label} has the shape {found.get(name)}, not "
                    f"{shape}. Use a file made for {self.label}."
                )
        return shapes

    def valid_tp_sizes(self, limit: int = 8) -> tuple[int, ...]:
        """The sizes up to ``limit`` that ``check_tp_size`` accepts."""
        return self.sizes.table.plan.valid_tp_sizes(limit)


def model_patch(family: str, comfyui_model: str, shapes: Mapping[str, Shape]) -> ModelPatch:
    """The sizes of a model patch whose tensors have been checked (``model_patch_shapes``)."""
    return family_named(family).model_patch(comfyui_model).of_tensors(shapes)


@contextmanager
def open_checkpoint(path: str) -> Iterator[CheckpointFile]:
    """A model file; or a diffusers folder, which then looks like ComfyUI's file of the model.

    Raises:
        CheckpointError: it is missing, cut short, not of its format, or a folder of no known class.
    """
    each = [(family.published, family.variant) for family in families().values()]
    tables = [sizes.table for both in each for sizes in both if sizes is not None]
    shapes = [item for table in tables for item in table.file_tensors.items()]
    axes = {name: len(shape) for name, shape in shapes if shape[0] == 1}
    with CheckpointFile.open(path, _names_in_folder, partial(_names_alone, path), axes) as file:
        yield file


def inspect_checkpoint(path: str) -> CheckpointInfo:
    """Recognise a model file and check that it is whole, from its header alone.

    Raises:
        CheckpointError: the file is missing, damaged, of an unknown architecture, lacks tensors,
            or has them in other shapes. (ComfyUI leaves out tensors that the architecture has
            not: they are ``extra``.)
    """
    with open_checkpoint(path) as file:
        stored, prefix = file.tensors(), file.prefix
        quantised, companions = find_quantised(
            path, stored, file.metadata, lambda name: file.read(name, None, None), prefix
        )
        metadata = {key: text for key, text in file.metadata.items() if key != QUANTIZATION}
    tensors = {name: info for name, info in stored.items() if name not in companions}
    tensors |= {
        name: TensorInfo(weight.shape, stored[name].dtype) for name, weight in quantised.items()
    }
    family = _recognised(path, tensors)
    sizes = _sizes_of_file(path, family, tensors, metadata)
    try:
        sizes.check_settings(_told(family, metadata))
    except ValueError as error:
        raise CheckpointError(
            f"The {family.label} file {path} cannot be split yet: {error}. Load it with the stock "
            "'Load Diffusion Model' node."
        ) from error
    tensors |= _without_padding(quantised, sizes.table)
    known = sizes.table.file_tensors.keys() | sizes.table.unused.keys()
    own = {name: info for name, info in tensors.items() if name in known}
    _check_tensors(path, family, own, quantised, sizes.table)
    quantised_bytes = sum(_bytes(stored[name]) for name in companions | quantised.keys())
    more = {name: info for name, info in tensors.items() if name not in known}
    return CheckpointInfo(
        path, family, sizes, own, metadata, quantised, quantised_bytes, more, prefix
    )


def _without_padding(
    quantised: Mapping[str, QuantisedWeight], table: Table
) -> dict[str, TensorInfo]:
    """Weights whose rows the file pads, with the model's shape."""
    found = {}
    for name, weight in quantised.items():
        shape, padded = table.file_tensors.get(name), weight.format.storage.padded
        if shape is not None and -(-shape[0] // padded) * padded == weight.shape[0]:
            found[name] = TensorInfo((shape[0], weight.shape[1]), weight.format.name)
    return found


def _bytes(info: TensorInfo) -> int:
    return info.num_elements * DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 0


def _recognised(path: str, tensors: Mapping[str, TensorInfo]) -> Family:
    found = [
        family
        for family in families().values()
        if all(name in tensors for name in family.signature)
    ]
    like = found[0].name if found else None
    shapes = {name: info.shape for name, info in tensors.items()}
    for other in OTHERS:
        if other.like == like and other.matches(shapes):
            raise CheckpointError(_refused(other.label, other.sign(shapes)))
    if found:
        return found[0]
    known = ", ".join(family.label for family in families().values())
    raise CheckpointError(
        f"The model file {path} is of an architecture that cannot be split yet (first tensors: "
        f"{_some(sorted(tensors))}). Supported: {known}. Load it with the stock 'Load Diffusion "
        "Model' node instead."
    )


def _sizes_of_file(
    path: str,
    family: Family,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str] | None = None,
) -> Sizes:
    for name, variant in family.variants.items():
        if name in tensors:
            raise CheckpointError(_refused(variant, f"it has the tensor {name}"))
    try:
        shapes = {name: info.shape for name, info in tensors.items()}
        told = _told(family, metadata or {})
        sizes = family.sizes.of_file(shapes, told)
        _ = sizes.table.file_tensors  # fails here if a size is none
    except KeyError as error:
        raise CheckpointError(
            f"The {family.label} file {path} lacks the tensor {error}. Download it again."
        ) from error
    except UntoldError as error:
        raise CheckpointError(
            f"The {family.label} file {path} does not tell the setting {error}: it belongs into "
            "the file's metadata, as 'config', below 'transformer', and was lost where the file "
            "was converted or merged. Take the published file, or one that has kept its metadata."
        ) from error
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"The {family.label} file {path} has tensors of impossible shapes, or metadata that do "
            f"not fit them ({error}). Download it again."
        ) from error
    for name, variant in family.variants.items():
        setting, _, value = name.partition("=")
        if value and str(told.get(setting)) == value:
            raise CheckpointError(_refused(variant, f"its metadata set {setting} to {value}"))
    return sizes


def _refused(label: str, why: str) -> str:
    spelt = label[:2].isupper()  # as it is spoken: an "el"
    article = "an" if label.startswith(tuple("AEFHILMNORSX" if spelt else "AEIO")) else "a"
    return (
        f"This is {article} {label} file ({why}), which cannot be split yet. "
        "Load it with the stock 'Load Diffusion Model' node."
    )


def _told(family: Family, metadata: Mapping[str, str]) -> Settings:
    """What a file's metadata say of its transformer, where ComfyUI looks at that.

    Raises ValueError for what is no JSON: another program's files may have anything there.
    """
    if not family.reads_settings:
        return {}
    config = json.loads(metadata.get("config", "{}"))
    found = config.get("transformer", {}) if isinstance(config, dict) else config
    if not isinstance(found, dict):
        raise ValueError(f"the metadata's config is {config!r:.80}")
    return found


def _names_in_folder(path: str, settings: Settings) -> FileNames:
    """How the tensors of a diffusers folder are called in ComfyUI's file of the model."""
    name = settings.get("_class_name")
    known = {family.diffusers_class: family for family in families().values()}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(
            f"The folder {path} holds a model of the class {name!r}, which cannot be split yet. "
            f"Supported: {', '.join(known)}. Load it with stock nodes."
        )
    family = known[name]
    for setting, variant in family.variants.items():
        if settings.get(setting):
            raise CheckpointError(
                f"This is {variant} (its {CONFIG} sets {setting}), which cannot be split "
                "yet. Load the model with stock nodes."
            )
    try:
        sizes = family.sizes.of_folder(settings)
        table, config = sizes.table, {"transformer": sizes.for_comfyui()}
        told = {"config": json.dumps(config)} if sizes.told() else {}
        return FileNames(family.label, table.places, table.file_tensors, table.swapped, told)
    except KeyError as error:
        raise CheckpointError(
            f"{CONFIG} of the folder {path} lacks the setting {error}. Download it again."
        ) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{CONFIG} of the folder {path} has a setting that is no size ({error}). "
            "Download it again."
        ) from error


def _names_alone(path: str, tensors: Mapping[str, TensorInfo]) -> FileNames | None:
    """How the tensors of a single diffusers file are called in ComfyUI's file of the model.

    Without its config.json, the sizes follow from the shapes: the blocks are counted, and the rows
    of what lies one on another in ComfyUI's file add up. None: the names are not diffusers'.
    """
    for family in families().values():
        if _has_comfyuis_names(family, tensors):
            return None
        stacks = tuple(
            replace(stack, count=blocks(stack.ours)(dict.fromkeys(tensors, ())))
            for stack in family.published.table.stacks
        )
        table = replace(family.published.table, stacks=stacks)
        parts: dict[str, list[tuple[int, ...]]] = {}
        for name in table.places.keys() & tensors.keys():
            if shape := tensors[name].shape:
                parts.setdefault(table.places[name].name, []).append(shape)
        ours = table.places.keys() & tensors.keys()
        if len(ours) <= len(table.file_tensors.keys() & tensors.keys()):
            continue
        if all(name in parts for name in family.signature):
            stacked = {
                name: TensorInfo((sum(rows for rows, *_ in shapes), *shapes[0][1:]), "")
                for name, shapes in parts.items()
            }
            own = _sizes_of_file(path, family, stacked).table
            return FileNames(family.label, own.places, own.file_tensors, own.swapped)
    return None


def _has_comfyuis_names(family: Family, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether all that the family's file must hold is there already."""
    if not all(name in tensors for name in family.signature):
        return False
    try:
        sizes = family.sizes.of_file({name: info.shape for name, info in tensors.items()})
        return sizes.table.file_tensors.keys() <= tensors.keys()
    except (
        KeyError,
        IndexError,
        UntoldError,
        ValueError,
        ZeroDivisionError,
    ):  # said when the file is read
        return False


def _check_tensors(
    path: str,
    family: Family,
    found: Mapping[str, TensorInfo],
    quantised: Mapping[str, QuantisedWeight],
    table: Table,
) -> None:
    problems = []
    expected = table.file_tensors
    missing = sorted(set(expected) - set(found))
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({_some(wrong)})")
    strange = [
        f"{name} as {found[name].dtype}"
        for name in expected
        if name in found and name not in quantised and found[name].dtype not in FLOAT_DTYPES
    ]
    if strange:
        problems.append(f"{len(strange)} stored in an unknown way ({_some(strange)})")
    if problems:
        raise CheckpointError(
            f"The {family.label} file {path} does not have the tensors of its architecture: "
            f"{'; '.join(problems)}. Download it again, or load it with the stock node."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown}, …"
