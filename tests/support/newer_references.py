"""What classes of newer releases of ComfyUI compute, stored for tests on a release without them.

    COMFYUI_PATH=CHECKOUT PYTHON tests/support/newer_references.py [FAMILY …]

computes every case, or those of some families, on tiny files with the classes of that checkout, and
writes the results below `tests/data`. PYTHON has the packages of that ComfyUI. Weights and inputs
are made again from their seeds wherever they are needed (`support.tiny_models`, `support.inputs`).
"""

import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its own folder is on the path then, which is no place to import from
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(TESTS), str(TESTS.parent)]

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support import minimax_payloads
from support.inputs import make_inputs
from support.native import import_comfy, native_model
from support.paths import REPOSITORY
from support.tiny_models import tiny, write_tiny

DATA = REPOSITORY / "tests" / "data"
DTYPES = (torch.float32, torch.bfloat16)

_REFERENCES = {"references": ((9, 8), (16, 12), (6, 30)), "height": 12, "width": 15}
_EDIT_2511, _LAYERED = {"zero_time": True}, {"added_time": True}
_MASK = torch.tensor([[1] * 20, [1] * 13 + [0] * 7])
_AT_ZERO = {"ref_latents_method": "index_timestep_zero"}

# Family → case → changes of the tiny model's sizes, and arguments of `make_inputs`.
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
    "minimax_h3": dict(minimax_payloads.CASES),
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
}


def inputs_of(family: str, case: str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of the model's forward."""
    changes, arguments = CASES[family][case]
    return make_inputs(tiny(family, **changes), dtype=dtype, **arguments)


def expected(family: str, case: str, dtype: torch.dtype) -> Any:
    """What the newer class computed in that dtype: a tensor, or a list of them."""
    name = _name(case, dtype)
    with safe_open(_path(family), framework="pt") as file:
        if name in file.keys():  # noqa: SIM118  (not a dict)
            return file.get_tensor(name)
        parts = sorted(key for key in file.keys() if key.startswith(f"{name}, "))  # noqa: SIM118
        return [file.get_tensor(key) for key in parts]


def _path(family: str) -> Path:
    return DATA / f"{family}_of_newer_comfyui.safetensors"


def _name(case: str, dtype: torch.dtype) -> str:
    return f"{case} ({str(dtype).removeprefix('torch.')})"


def _computed(family: str, case: str, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    path = write_tiny(family, folder / "tiny.safetensors", **CASES[family][case][0])
    inputs = inputs_of(family, case, dtype)
    with torch.inference_mode():
        model = native_model(path, dtype)
        found = model(inputs.pop("x"), inputs.pop("timesteps"), **inputs)
    name = _name(case, dtype)
    if isinstance(found, torch.Tensor):
        return {name: found.contiguous()}
    return {f"{name}, {index}": one.contiguous() for index, one in enumerate(found)}


def main(families: Collection[str]) -> None:
    """Write the files; of these families, or of all."""
    import_comfy()
    from comfyui_version import __version__

    DATA.mkdir(exist_ok=True)
    about = {"comfyui": __version__, "torch": torch.__version__, "made_by": Path(__file__).name}
    with tempfile.TemporaryDirectory() as folder:
        for family, cases in CASES.items():
            if families and family not in families:
                continue
            results: dict[str, torch.Tensor] = {}
            for case in cases:
                for dtype in DTYPES:
                    results |= _computed(family, case, dtype, Path(folder))
            save_file(results, _path(family), metadata=about)
            print(_path(family).relative_to(REPOSITORY), _path(family).stat().st_size, about)


if __name__ == "__main__":
    main(sys.argv[1:])
