"""What the runtime's Python has and sees, as JSON on its last line. A program of its own.

``doctor`` feeds it to that Python, where nothing of this package need be importable.
"""

import importlib
import importlib.metadata
import json
import platform
from typing import Any

# Package → the module whose import shows that it works, as the ranks import it.
_MODULES = {
    "torch": "torch",
    "vllm": "vllm.distributed",
    "diffusers": "diffusers",
    "msgspec": "msgspec",
    "safetensors": "safetensors.torch",
}


def _packages(requirements: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {name: _package(name, requirements.get(name)) for name in _MODULES}


def _package(name: str, requirement: "str | None") -> dict[str, Any]:
    """``version``, ``error`` (of the import) and ``fits`` (the version, ``requirement``)."""
    found: dict[str, Any] = {"version": None, "error": None, "fits": True}
    try:
        importlib.import_module(_MODULES[name])
        found["version"] = importlib.metadata.version(name)
    except Exception as error:  # noqa: BLE001  a broken package may raise anything
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if requirement is not None:
            from packaging.specifiers import SpecifierSet  # vLLM needs it, too

            found["fits"] = SpecifierSet(requirement).contains(found["version"], prereleases=True)
    return found


def _gpus() -> dict[str, Any]:
    """The GPUs, which pairs cannot reach each other directly, and NCCL's version and error."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found: dict[str, Any] = {"cuda_build": torch.version.cuda, "gpus": [], "apart": []}
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        found["gpus"].append({"name": gpu.name, "total_bytes": gpu.total_memory})
    for first in range(count):
        for second in range(first + 1, count):
            if not torch.cuda.can_device_access_peer(first, second):
                found["apart"].append([first, second])
    if count:
        try:
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            _all_reduce(count)
        except Exception as error:  # noqa: BLE001  whatever NCCL raises is the finding
            found["nccl_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def _all_reduce(count: int) -> None:
    """Sum over all GPUs, with NCCL. Raises RuntimeError if the sum is wrong."""
    import torch

    tensors = [torch.full((2**20,), float(index), device=index) for index in range(count)]
    torch.cuda.nccl.all_reduce(tensors)
    expected = count * (count - 1) / 2
    wrong = [index for index, tensor in enumerate(tensors) if not bool((tensor == expected).all())]
    if wrong:
        raise RuntimeError(f"the sum over {count} GPUs is wrong on {wrong}")


def main(requirements: dict[str, str]) -> None:
    """Print the findings; ``requirements``: package → versions that the ranks work with."""
    found: dict[str, Any] = {"python": platform.python_version()}
    found["packages"] = _packages(requirements)
    if found["packages"]["torch"]["error"] is None:
        found |= _gpus()
    print("\n" + json.dumps(found))
