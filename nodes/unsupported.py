"""The refusals: what a model on other processes cannot do, said by name.

A refusal names the node's feature that causes it and what to do. Nothing is computed.
"""

from comfyui_version import __version__

from ..tp_runtime.client import TPRuntimeError
from .origins import describe, described, origin


class UnsupportedFeatureError(TPRuntimeError, ValueError):
    """A node asks something of the MODEL that a model on the ranks cannot do."""


_INSTEAD = (
    "Remove or bypass that node, or load this model with the stock 'Load Diffusion Model' node."
)

# Where transformer_options hold Python code, and what is done with it there. First match.
_USES = (
    ("patches_replace.dit", "takes the place of a block (leaving blocks out is supported)"),
    ("patches_replace.", "takes the place of attention layers"),
    ("patches.post_input", "changes what the blocks are given"),
    ("patches.attn", "changes what attention layers are given or return"),
    ("patches.", "is called in the model's blocks, as ControlNets that are model patches are"),
    ("optimized_attention_override", "takes the place of the attention function"),
)


def python_code_in_options(where: str, code: object) -> UnsupportedFeatureError:
    """For a callable at `where` (a dotted path) in `transformer_options`."""
    use = next((text for prefix, text in _USES if where.startswith(prefix)), None)
    return UnsupportedFeatureError(
        f"transformer_options['{where}'] is a Python function, {describe(code)}"
        f"{f', which {use}' if use else ''}. A tensor-parallel model runs in other processes, "
        f"where such functions cannot be called. {_INSTEAD}"
    )


def code_in_model(where: str, code: object) -> UnsupportedFeatureError:
    """For a function or module at `where` in the native model, in the place of its own."""
    of_bypass = origin(code)[0] == "comfy.weight_adapter.bypass"
    return UnsupportedFeatureError(
        f"A node has replaced '{where}' in the model by code of its own: {describe(code)}. A "
        "tensor-parallel model computes in other processes, where that code cannot be called. "
        f"{'Load the LoRA without bypass. ' if of_bypass else ''}{_INSTEAD}"
    )


def model_of_other_group(gpu_count: str) -> UnsupportedFeatureError:
    """For code of a node that evaluates the loader's model where TP Sampler has chosen a group."""
    return UnsupportedFeatureError(
        f"TP Sampler has gpu_count {gpu_count}, but a node before it has put code around the model "
        "that calls the one of the loader, on the loader's GPUs. Set TP Sampler's gpu_count to "
        "'from model', and that number on the loader."
    )


def data_in_model(where: str, value: object) -> UnsupportedFeatureError:
    """For a number, a text or a tensor that a node has put at `where` in the native model."""
    shown = f"a {type(value).__name__}" if hasattr(value, "shape") else repr(value)
    return UnsupportedFeatureError(
        f"A node has set '{where}' in the model to {shown}. A tensor-parallel model computes in "
        f"other processes with the settings of its file. {_INSTEAD}"
    )


def unknown_argument(where: str, value: object) -> UnsupportedFeatureError:
    """For an argument of the model's forward that is neither a tensor nor plain data."""
    return UnsupportedFeatureError(
        f"The model's argument '{where}' is a {type(value).__name__}; only tensors, numbers, text, "
        "lists and dictionaries can be sent to a tensor-parallel model. It comes from a node "
        f"between the loader and the sampler. {_INSTEAD}"
    )


def unknown_option(where: str, value: object) -> UnsupportedFeatureError:
    """For something at `where` in `transformer_options` that the model would compute with."""
    return UnsupportedFeatureError(
        f"transformer_options['{where}'] is a {type(value).__name__}, with which a tensor-parallel "
        "model cannot compute: it takes dictionaries of numbers, of the options that its family "
        f"has. It comes from a node between the loader and the sampler. {_INSTEAD}"
    )


def refused_input(label: str, name: str, what: str) -> UnsupportedFeatureError:
    """For an argument that the running ComfyUI's class takes, and the forward on the ranks not."""
    return UnsupportedFeatureError(
        f"{label} was given the input '{name}': {what}. ComfyUI {__version__} may take it; "
        "tensor-parallel models of this kind do not. Remove or bypass the node that sets it "
        "(between the text encoder and the sampler), or load this model with the stock 'Load "
        "Diffusion Model' node."
    )


def other_compute_dtype(got: str, allowed: str) -> UnsupportedFeatureError:
    """For a latent in another dtype than the one the ranks compute in."""
    return UnsupportedFeatureError(
        f"The model was asked to compute in {got}, but its ranks compute in {allowed}. This comes "
        "from a node that changes the compute dtype, such as ModelComputeDtype. Remove it and set "
        "weight_dtype on 'Load Diffusion Model (TP)' instead."
    )


def gradients() -> UnsupportedFeatureError:
    """For a forward that something wants to differentiate."""
    return UnsupportedFeatureError(
        "A node asked for gradients through the model (training, or a guider that differentiates "
        f"the model). A tensor-parallel model runs forward only. {_INSTEAD}"
    )


def merged_weights(key: str) -> UnsupportedFeatureError:
    """For a weight that is to be mixed with another model's."""
    return UnsupportedFeatureError(
        f"The weight '{key}' is to be merged with another model's (ModelMerge nodes). Only LoRAs "
        f"can change the weights of a tensor-parallel model. {_INSTEAD}"
    )


def unknown_patch(key: str, what: str) -> UnsupportedFeatureError:
    """For a change of a weight that is Python code, or of a kind that is not known."""
    return UnsupportedFeatureError(
        f"The weight '{key}' is patched in a way that a tensor-parallel model does not know: "
        f"{what}. {_INSTEAD}"
    )


def weight_functions(num_weights: int) -> UnsupportedFeatureError:
    """For Python functions that are to be called on a weight at every step."""
    return UnsupportedFeatureError(
        f"A node wraps {num_weights} weights of the model in Python functions (training nodes do). "
        "A tensor-parallel model runs in other processes, where such functions cannot be called. "
        f"{_INSTEAD}"
    )


def reshaped_weight(
    name: str, shape: tuple[int, ...], wanted: tuple[int, ...], why: str
) -> UnsupportedFeatureError:
    """For a LoRA that is to make a weight larger, and cannot."""
    return UnsupportedFeatureError(
        f"A LoRA is to make the weight '{name}' of the shape {list(shape)} one of {list(wanted)}: "
        f"{why}. It was made for another model: load that one, or remove the LoRA."
    )


def widened_by_hook(
    name: str, shape: tuple[int, ...], larger: tuple[int, ...]
) -> UnsupportedFeatureError:
    """For a LoRA that gives the model more inputs while it is sampled."""
    return UnsupportedFeatureError(
        f"A hook's LoRA makes the weight '{name}' larger ({list(shape)} to {list(larger)}). A "
        "hook can change the numbers of a weight only, with the stock loader, too: load that LoRA "
        "with LoraLoaderModelOnly."
    )


def reading_weights() -> UnsupportedFeatureError:
    """For nodes that want the weights themselves."""
    return UnsupportedFeatureError(
        "A node wants to read the model's weights (ModelMerge, ModelSave, LoRA extraction or "
        "training nodes). The weights of a tensor-parallel model are split over other processes. "
        f"{_INSTEAD}"
    )


def absent_weight(name: str, user: tuple[str, str]) -> UnsupportedFeatureError:
    """For the function `user` (module, qualified name) that computes with a weight, or reads it."""
    return UnsupportedFeatureError(
        f"{described(*user)} uses the weight '{name}' of the model in ComfyUI's process. A "
        f"tensor-parallel model has its weights in other processes. {_INSTEAD}"
    )


def cfg_split() -> UnsupportedFeatureError:
    """For ComfyUI's own splitting of a model's work over GPUs."""
    return UnsupportedFeatureError(
        "A multi-GPU node asked for a copy of the model on another GPU. A tensor-parallel model "
        "uses several GPUs by itself: remove that node and set gpu_count."
    )
