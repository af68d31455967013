"""What classes of newer releases of ComfyUI compute, stored for tests on a release without them.

    COMFYUI_PATH=CHECKOUT PYTHON tests/support/newer_references.py [FAMILY ...]

computes every case (of these families) on tiny files with the classes of that checkout, and writes
the results below `tests/data`. PYTHON has the packages of that ComfyUI. Weights and inputs are made
again from their seeds wherever they are needed (`support.tiny_models`, `support.inputs`).
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its own folder is on the path then, which is no place to import from
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(TESTS), str(TESTS.parent)]

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.inputs import make_inputs
from support.native import import_comfy, native_model, native_patcher
from support.paths import REPOSITORY
from support.tiny_models import tiny, write_tiny

DATA = REPOSITORY / "tests" / "data"
DTYPES = (torch.float32, torch.bfloat16)
STORED_AS = "stored_as"

_REFERENCES = {"references": ((9, 8), (16, 12), (6, 30)), "height": 12, "width": 15}
_EDIT_2511, _LAYERED = {"zero_time": True}, {"added_time": True}
_MASK = torch.tensor([[1] * 20, [1] * 13 + [0] * 7])
_AT_ZERO = {"ref_latents_method": "index_timestep_zero"}

# Such that bf16, to which the model rounds 1000 t and t, does not change: then it is the arithmetic
# that differs from fp32's.
_EXACT_TIMES = {"timesteps": torch.tensor([0.5])}
_SMALL = {"height": 6, "width": 7}
_SLOTS = _SMALL | {"references": ((5, 4), (8, 6), (3, 9)), "image_slots": [3, 3, 11]}

# Family → case → changes of the tiny model's sizes, and arguments of `make_inputs`. Among the first
# may be a quantised format that the file is `stored_as`; it computes in fp32 only.
Case = tuple[Mapping[str, Any], Mapping[str, Any]]
CASES: dict[str, dict[str, Case]] = {
    "flux2": {
        "references at time 0": ({}, _REFERENCES | _AT_ZERO),
        "references at time 0, without guidance": (
            {"guidance": False},
            _REFERENCES | _AT_ZERO | {"batch": 2, "without": ("guidance",)},
        ),
        "references at time 0 with a ControlNet": (
            {},
            _REFERENCES | _AT_ZERO | {"residuals": {"input": (90, None), "output": (None, 200)}},
        ),
    },
    "qwen_image": {
        "2511 without references": (_EDIT_2511, {}),
        "2511 with references": (_EDIT_2511, _REFERENCES),
        "2511, batch": (_EDIT_2511, _REFERENCES | {"batch": 2}),
        "2511, references by index": (_EDIT_2511, _REFERENCES | {"ref_latents_method": "index"}),
        "2511 with a ControlNet": (
            _EDIT_2511,
            _REFERENCES | {"residuals": {"input": (48, None, 30)}},
        ),
        "references at time 0 in any file": ({}, _REFERENCES | _AT_ZERO),
        "references before the image": ({}, _REFERENCES | {"ref_latents_method": "negative_index"}),
        "layers": (_LAYERED, {"frames": 3, "height": 10, "width": 12}),
        "layers of odd sizes, batch": (
            _LAYERED,
            {"frames": 2, "height": 9, "width": 7, "batch": 2, "length": 33},
        ),
        "layers with a reference": (
            _LAYERED,
            {"frames": 4, "height": 8, "width": 6, "references": ((8, 6),)},
        ),
        "layers with references at time 0": (
            _LAYERED,
            {"frames": 2, "height": 8, "width": 6, "references": ((8, 6), (5, 7))} | _AT_ZERO,
        ),
        "captions of different lengths": ({}, {"batch": 2, "attention_mask": _MASK}),
    },
    "qwen_image_21": {
        "text to image": ({}, _EXACT_TIMES | {"height": 8, "width": 8}),
        "times that bf16 rounds": ({}, _SMALL | {"timesteps": torch.tensor([0.7131])}),
        "odd sizes, gate and up apart": (
            {"fused": False},
            _EXACT_TIMES | {"height": 7, "width": 9, "length": 33},
        ),
        "batch of 3": (
            {},
            {"batch": 3, "height": 4, "width": 6, "length": 1}
            | {"timesteps": torch.tensor([1.0, 0.5, 0.25])},
        ),
        "references behind the text": (
            {},
            _EXACT_TIMES | _SMALL | {"references": ((5, 4), (8, 6))},
        ),
        "references in the text": ({}, _EXACT_TIMES | _SLOTS),
        "references in the text, gate and up apart": ({"fused": False}, _EXACT_TIMES | _SLOTS),
        "references at its ends, batch": (
            {},
            _SMALL
            | {"references": ((5, 4), (8, 6)), "image_slots": [0, 20], "batch": 2}
            | {"timesteps": torch.tensor([0.5, 0.25])},
        ),
        "fewer places than references": (
            {},
            _EXACT_TIMES | _SMALL | {"references": ((5, 4), (4, 6)), "image_slots": [7]},
        ),
        "more places than references": (
            {},
            _EXACT_TIMES | _SMALL | {"references": ((5, 4),), "image_slots": [7, 9]},
        ),
        "places without references": ({}, _EXACT_TIMES | _SMALL | {"image_slots": [7, 9]}),
        "int8_convrot": ({"stored_as": "int8_convrot"}, _EXACT_TIMES | _SLOTS),
        "int8_convrot, gate and up apart": (
            {"stored_as": "int8_convrot", "fused": False},
            _EXACT_TIMES | _SLOTS,
        ),
        "fp8": ({"stored_as": "fp8"}, _EXACT_TIMES | _SLOTS),
    },
}


def inputs_of(family: str, case: str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of the model's forward."""
    changes, arguments = CASES[family][case]
    sizes = {name: value for name, value in changes.items() if name != STORED_AS}
    return make_inputs(tiny(family, **sizes), dtype=dtype, **arguments)


def write_case(family: str, path: Path, changes: Mapping[str, Any]) -> Path:
    """The tiny file of a case with these changes."""
    sizes = dict(changes)
    stored_as = sizes.pop(STORED_AS, None)
    if stored_as is None:
        return write_tiny(family, path, **sizes)
    from support.quantised_files import write_quantised  # of a package that not every test needs

    return write_quantised(write_tiny(family, path.with_suffix(".whole"), **sizes), path, stored_as)


def expected(family: str, case: str, dtype: torch.dtype) -> torch.Tensor:
    """What the newer class computed in that dtype."""
    with safe_open(_path(family), framework="pt") as file:
        found: torch.Tensor = file.get_tensor(_name(case, dtype))
    return found


def _path(family: str) -> Path:
    return DATA / f"{family}_of_newer_comfyui.safetensors"


def _name(case: str, dtype: torch.dtype) -> str:
    return f"{case} ({str(dtype).removeprefix('torch.')})"


def _computed(family: str, case: str, dtype: torch.dtype, folder: Path) -> torch.Tensor:
    changes = CASES[family][case][0]
    path = write_case(family, folder / "tiny.safetensors", changes)
    inputs = inputs_of(family, case, dtype)
    quantised = STORED_AS in changes
    model = native_patcher(path).model.diffusion_model if quantised else native_model(path, dtype)
    with torch.inference_mode():
        found: torch.Tensor = model(inputs.pop("x"), inputs.pop("timesteps"), **inputs)
    return found.contiguous()


def main() -> None:
    """Write the files."""
    import_comfy()
    from comfyui_version import __version__

    DATA.mkdir(exist_ok=True)
    about = {"comfyui": __version__, "torch": torch.__version__, "made_by": Path(__file__).name}
    with tempfile.TemporaryDirectory() as folder:
        for family in sys.argv[1:] or CASES:
            results = {
                _name(case, dtype): _computed(family, case, dtype, Path(folder))
                for case, (changes, _) in CASES[family].items()
                for dtype in DTYPES[: 1 if STORED_AS in changes else 2]
            }
            save_file(results, _path(family), metadata=about)
            print(_path(family).relative_to(REPOSITORY), _path(family).stat().st_size, about)


if __name__ == "__main__":
    main()
