"""What a model file is, from its header: its family, sizes and tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from ..files.checkpoint import CheckpointFile
from ..files.fp8_scales import METADATA as QUANTIZATION
from ..files.fp8_scales import find_scales
from ..files.safetensors_file import TensorInfo

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


_SHOWN_NAMES = 5


@dataclass(frozen=True)
class CheckpointInfo:
    """What a model file is, from its header. ``config`` has the fields of the family's module.

    ``tensors`` are the model's own; ``scales``: quantised weight → the name of its scale in the
    file. ``metadata`` is the file's, without what it says of quantisation.
    """

    path: str
    family: str
    label: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    scales: Mapping[str, str] = field(repr=False)

    @property
    def unused(self) -> frozenset[str]:
        """Names of tensors that files have, but that no implementation computes with."""
        from ..models import family

        unused: frozenset[str] = family(self.family).UNUSED
        return unused

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the weights in a dtype of ``itemsize`` bytes; those with a scale stay in fp8."""
        return sum(
            tensor.num_elements * (1 if name in self.scales else itemsize)
            for name, tensor in self.tensors.items()
        )

    def check_tp_size(self, tp_size: int) -> None:
        """Raises SizeError if the model cannot be split over ``tp_size`` ranks."""
        from ..models import family

        family(self.family).plan(self.config).check_tp_size(tp_size, self.label)

    def valid_tp_sizes(self, limit: int = 8) -> tuple[int, ...]:
        """The sizes up to ``limit`` that ``check_tp_size`` accepts."""
        from ..models import family

        return family(self.family).plan(self.config).valid_tp_sizes(limit)


def inspect_checkpoint(path: str) -> CheckpointInfo:
    """Recognise a model file and check that it is whole, from its header alone.

    Raises:
        CheckpointError: the file is missing, damaged, of an unknown architecture, lacks tensors,
            has tensors that the architecture has not, or has them in other shapes.
    """
    from ..models import FAMILIES

    with CheckpointFile.open(path) as file:
        stored = file.tensors()
        scales, extra = find_scales(
            path, stored, file.metadata, lambda name: file.read(name, None, None)
        )
        metadata = {key: text for key, text in file.metadata.items() if key != QUANTIZATION}
    tensors = {name: info for name, info in stored.items() if name not in extra}
    for module in FAMILIES.values():
        if module.recognises(tensors):
            break
    else:
        known = ", ".join(module.LABEL for module in FAMILIES.values())
        raise CheckpointError(
            f"The model file {path} is of an architecture that cannot be split yet (first "
            f"tensors: {_some(sorted(tensors))}). Supported: {known}. Load it with the stock "
            "'Load Diffusion Model' node instead."
        )
    try:
        config = module.infer_config(tensors)
        expected = module.file_tensors(config)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"The {module.LABEL} file {path} lacks the tensor {error}. Download it again."
        ) from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"The {module.LABEL} file {path} has tensors of impossible shapes ({error}). "
            "Download it again."
        ) from error
    _check_tensors(path, module.LABEL, tensors, expected, module.UNUSED)
    return CheckpointInfo(path, module.FAMILY, module.LABEL, config, tensors, metadata, scales)


def _check_tensors(
    path: str,
    label: str,
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    unused: frozenset[str],
) -> None:
    problems = []
    missing = sorted(set(expected) - set(found))
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    leftover = sorted(set(found) - set(expected) - unused)
    if leftover:
        problems.append(f"{len(leftover)} unknown ({_some(leftover)})")
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
        if name in found and found[name].dtype not in FLOAT_DTYPES
    ]
    if strange:
        problems.append(f"{len(strange)} stored in an unknown way ({_some(strange)})")
    if problems:
        raise CheckpointError(
            f"The {label} file {path} does not have the tensors of its architecture: "
            f"{'; '.join(problems)}. Download it again, or load it with the stock node."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown}, …"
