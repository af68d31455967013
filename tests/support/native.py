"""ComfyUI's own models, loaded in this process from the tiny checkpoints: the parity reference."""

import functools
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from support.paths import comfyui_path
from tp_runtime.models import families

_WITH_TRUTH_VALUES = ("comfy.ldm.qwen_image21.model",)  # see `_mend_attention`


def import_comfy() -> None:
    """Make `import comfy` work in this process, as ComfyUI started with `--cpu` has it.

    ComfyUI's root goes to the end of the path: its top-level names (`nodes`, `utils`, `tests`)
    must not hide ours.
    """
    root = str(comfyui_path())
    if root not in sys.path:
        sys.path.append(root)
    from comfy.cli_args import args

    args.cpu = True
    _mend_attention()


def _mend_attention() -> None:
    """Classes that give attention masks of truth values get torch's attention, as on GPUs.

    ComfyUI's for CPUs adds such a mask to the scores, as ones and zeros.
    """
    for name in _WITH_TRUTH_VALUES:
        if (comfyui_path() / name.replace(".", "/")).with_suffix(".py").is_file():
            from comfy.ldm.modules.attention import attention_pytorch

            import_module(name).optimized_attention = attention_pytorch  # type: ignore[attr-defined]


@functools.cache
def _unused() -> frozenset[str]:
    return frozenset(name for one in families().values() for name in one.small.table.unused)


def native_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """ComfyUI's own model with the weights of a tiny file, computing in `dtype`.

    Call it as ComfyUI's BaseModel does: `model(x, timesteps, context, ...)`.
    """
    return _load(path, dtype).model.diffusion_model


def native_patcher(path: Path, plain_dtype: torch.dtype | None = None) -> Any:
    """ComfyUI's ModelPatcher of a tiny file, as its own loader makes it; computes in fp32.

    `plain_dtype`: the dtype to hold an fp8 file without scales in.
    """
    import_comfy()
    import comfy.sd

    from support.comfy_pack.detection import tiny_models_detected

    options = {} if plain_dtype is None else {"dtype": plain_dtype}
    with tiny_models_detected():
        return comfy.sd.load_diffusion_model(str(path), options)


def native_fp8(path: Path, plain_dtype: torch.dtype | None = None) -> Any:
    """ComfyUI's model of a tiny fp8 file, computing in fp32, as ComfyUI itself loads it.

    `plain_dtype`: the dtype of a file without scales; ComfyUI would cast it up on a CPU.
    """
    return native_patcher(path, plain_dtype).model.diffusion_model


def _load(path: Path, dtype: torch.dtype) -> Any:
    import_comfy()
    import comfy.ops
    import comfy.sd

    from support.comfy_pack.detection import tiny_models_detected

    # Without its operations ComfyUI would keep bf16 weights and compute in fp32 on a CPU.
    options = {"dtype": dtype, "custom_operations": comfy.ops.disable_weight_init}
    with tiny_models_detected():
        patcher = comfy.sd.load_diffusion_model(str(path), options)
    # ComfyUI only logs missing and unexpected keys.
    in_model = patcher.model.diffusion_model.state_dict().keys()
    with safe_open(path, framework="pt") as file:
        # Newer releases leave out what no forward uses.
        in_file = {name for name in file.keys() if name in in_model or name not in _unused()}  # noqa: SIM118
    num_in_file, num_in_model = len(in_file), len(in_model)
    assert num_in_file == num_in_model, (num_in_file, num_in_model)
    return patcher
