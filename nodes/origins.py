"""Where Python code comes from that a node has put into a model: said in a refusal."""

import functools
import inspect
from pathlib import PurePath
from typing import Any

from comfy.ldm.modules import attention

# Other ways to compute the same attention; what ComfyUI registers beside them rounds its inputs.
_EXACT_ATTENTION = ("pytorch", "sub_quad", "split", "xformers", "flash")


def origin(code: Any) -> tuple[str, str]:
    """Module and qualified name of a function, or of the class of an object that is called."""
    while isinstance(code, functools.partial):
        code = code.func
    named = code if hasattr(code, "__qualname__") else type(code)
    return str(getattr(named, "__module__", "")), str(named.__qualname__)


def describe(code: Any) -> str:
    """`patch of NAGuidance (comfy_extras.nodes_nag of ComfyUI)`, as an error says it."""
    return described(*origin(chosen_attention(code) or code))


def described(module: str, qualified: str) -> str:
    """The same, for a function of that name in that module."""
    names = [name for name in qualified.split(".") if name not in ("<locals>", "execute")]
    names = names or [qualified]
    what = names[-1] if len(names) == 1 else f"{names[-1]} of {names[0]}"
    return f"{what} ({_owner(module)})"


def module_of_nodes(module: str) -> str:
    """`comfy_extras.nodes_flux` for a module of ComfyUI's own nodes; empty for others.

    Newer releases name those by the path of their file, as those of node packs.
    """
    path = _path(module)
    if "custom_nodes" in path.parts or path.parts[-2:-1] != ("comfy_extras",):
        return module if module.startswith("comfy_extras.") else ""
    return f"comfy_extras.{path.name}"


def _owner(module: str) -> str:
    """A module for a person: ComfyUI names those of node packs by the path of their folder."""
    path = _path(module)
    if "custom_nodes" in path.parts[:-1]:
        inside = path.parts[path.parts.index("custom_nodes") + 1]
        return f"of the node pack {inside.split('.')[0]}"
    module = module_of_nodes(module) or module
    stock = module.split(".")[0] in ("comfy", "comfy_extras", "nodes")
    return f"{module} of ComfyUI" if stock else module


def _path(module: str) -> PurePath:
    """Newer releases write "_x_" for the dots in it."""
    return PurePath(module.replace("_x_", "."))


def chosen_attention(code: Any) -> Any:
    """What ComfyUI's `set_model_optimized_attention` was given; None: `code` is not made by it."""
    if not inspect.isfunction(code) or code.__module__ != "comfy.model_patcher":
        return None
    return inspect.getclosurevars(code).nonlocals.get("optimized_attention")


def is_exact_attention(code: Any) -> bool:
    """Whether an attention override only asks for attention, computed in some exact way.

    The ranks compute it with the kernel that was measured to be fastest.
    """
    registered = getattr(attention, "REGISTERED_ATTENTION_FUNCTIONS", {})
    chosen = chosen_attention(code)
    return chosen is not None and chosen in [registered.get(name) for name in _EXACT_ATTENTION]


def is_of_reference_cache(code: Any) -> bool:
    """Whether it is FluxKVCache's: it does nothing to an evaluation without reference images."""
    module, name = origin(code)
    cache = name.startswith("KV_Attn_Input") or "KVCache.execute." in name
    return cache and module_of_nodes(module) != ""
