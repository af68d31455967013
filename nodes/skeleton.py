"""ComfyUI's own model of a file, with everything but the weights.

What ComfyUI's stock loader does (`load_diffusion_model_state_dict` in comfy/sd.py), step by step,
on a state dict whose large tensors are on the meta device and without the scales of quantised
weights. The model is the standard BaseModel of the running ComfyUI, so samplers, latent formats and
LoRA key maps are its own; who computes with its weights gets an error (`absent.py`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import comfy.model_detection
import comfy.model_management
import comfy.supported_models
import comfy.utils
import torch

from ..tp_runtime.client import (
    STORED_DTYPES,
    WEIGHT_DTYPES,
    CheckpointError,
    CheckpointInfo,
    open_checkpoint,
)
from .absent import make_absent
from .native_code import moves_references
from .outer_weights import OuterWeights
from .unsupported import reading_weights

# Tensors below this size are read: model detection looks at their values.
_SMALL_NUMEL = 4096


def build_skeleton(info: CheckpointInfo, dtype: torch.dtype | None) -> Any:
    """A BaseModel without weights. `dtype` None: what the stock loader chooses for the file.

    Raises:
        CheckpointError: the running ComfyUI does not know the model, or builds it differently.
    """
    state_dict = _state_dict(info)
    config = _model_config(info, state_dict)
    _set_dtypes(config, info, state_dict, dtype)
    model = config.get_model(state_dict, "", device="meta")
    _give_weights(model.diffusion_model)
    _assign_tensors(info, model, state_dict)
    model.tp_outer_weights = OuterWeights(info)
    model.diffusion_model.references_move = moves_references(model.diffusion_model)
    make_absent(model.diffusion_model, model.tp_outer_weights)
    model.device = comfy.model_management.unet_offload_device()
    model.state_dict_for_saving = _refuse_saving
    return model.eval()


def _give_weights(model: torch.nn.Module) -> None:
    """Give layers that have none weights on the meta device, of their sizes.

    Since 0.33, with a GPU ("dynamic VRAM"), linear layers and embeddings have none until a file is
    loaded into them (`disable_weight_init` in comfy/ops.py), and no shapes to compare.
    """
    for layer in model.modules():
        if not isinstance(layer, torch.nn.Linear | torch.nn.Embedding) or layer.weight is not None:
            continue
        sizes = {"weight": _weight_shape(layer)}
        if getattr(layer, "comfy_need_lazy_init_bias", False):
            sizes["bias"] = sizes["weight"][:1]
        for name, shape in sizes.items():
            empty = torch.empty(shape, dtype=layer.weight_comfy_model_dtype, device="meta")
            setattr(layer, name, torch.nn.Parameter(empty, requires_grad=False))


def _weight_shape(layer: torch.nn.Linear | torch.nn.Embedding) -> tuple[int, int]:
    if isinstance(layer, torch.nn.Linear):
        return layer.out_features, layer.in_features
    return layer.num_embeddings, layer.embedding_dim


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype in which a BaseModel hands latents to its diffusion model."""
    return model.manual_cast_dtype or model.get_dtype()


def _refuse_saving(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise reading_weights()


def _state_dict(info: CheckpointInfo) -> dict[str, torch.Tensor]:
    """The file's tensors: the small ones as they are, the others on the meta device."""
    tensors = {}
    with open_checkpoint(info.path) as file:
        for name, tensor in (*info.tensors.items(), *info.extra.items()):
            if name in info.quantised:  # in any dtype: nobody looks at its numbers
                tensors[name] = torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
                continue
            if tensor.dtype not in STORED_DTYPES:
                raise CheckpointError(
                    f"Tensor {name} of {info.path} is stored as {tensor.dtype}. Supported: "
                    f"{', '.join(STORED_DTYPES)}. Choose another file of this model."
                )
            if 0 < tensor.num_elements < _SMALL_NUMEL:
                tensors[name] = file.read(name, None, None).clone()
            else:
                dtype = STORED_DTYPES[tensor.dtype]
                tensors[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return tensors


def _model_config(info: CheckpointInfo, state_dict: Mapping[str, torch.Tensor]) -> Any:
    """ComfyUI's description of the model, with the sizes that the file has."""
    detected = comfy.model_detection.model_config_from_unet(
        state_dict, "", metadata=dict(info.metadata)
    )
    # An older release takes such a file for another model: its class is not for that setting.
    matched = {} if detected is None else type(detected).unet_config
    told = info.sizes.told().items()
    _refuse_newer(info, [f"{name}={value}" for name, value in told if matched.get(name) != value])
    if detected is None:
        _refuse_newer(info, info.tensors)
        raise CheckpointError(
            f"This ComfyUI does not know the {info.label} model of {info.path}. Update ComfyUI."
        )
    # ComfyUI recognises models by what is in the file, but hard-codes sizes that it cannot see
    # there: head counts above all (0.3.75: FLUX 24, Z-Image 30 at width 3840). Ours are read from
    # the file, and equal ComfyUI's for the released models.
    kind = getattr(comfy.supported_models, info.family.comfyui_class or "", type(detected))
    config = kind(detected.unet_config | info.sizes.for_comfyui())
    for name, value in vars(detected).items():
        if name not in vars(config):
            setattr(config, name, value)
    return config


def _refuse_newer(info: CheckpointInfo, unknown: Iterable[str]) -> None:
    """Raises CheckpointError if the running ComfyUI is too old for the file.

    ``unknown``: tensors, and ``setting=value`` of its metadata.
    """
    for name in info.family.newer.keys() & set(unknown):
        variant, version = info.family.newer[name]
        setting, _, value = name.partition("=")
        how = f"its metadata set {setting} to {value}" if value else f"it has the tensor {name}"
        raise CheckpointError(
            f"{info.path} is a {variant} file ({how}), which this ComfyUI does not know. Update "
            f"ComfyUI: {version} knows it."
        )


def _set_dtypes(
    config: Any,
    info: CheckpointInfo,
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> None:
    """Choose storage and compute dtype as `load_diffusion_model_state_dict` does.

    Quantised weights stay as they are in any case: the dtypes are those of the others, which in
    such a file are not rounded to fp8 (ComfyUI 0.33, `mixed_precision_ops`).
    """
    if info.quantised and dtype is not None and dtype.itemsize == 1:
        dtype = None
    management = comfy.model_management
    supported = list(config.supported_inference_dtypes)
    if info.family.overflows_in_fp16:
        supported = [one for one in supported if one != torch.float16]
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state_dict),
            supported_dtypes=supported,
            weight_dtype=None if info.quantised else comfy.utils.weight_dtype(state_dict),
        )
    manual_cast = management.unet_manual_cast(dtype, management.get_torch_device(), supported)
    if str(dtype).removeprefix("torch.") not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"ComfyUI was started with an option that asks for weights in {dtype}, which a "
            f"tensor-parallel model cannot hold. Allowed: {', '.join(WEIGHT_DTYPES)}. Start "
            "ComfyUI without that option, or set weight_dtype on 'Load Diffusion Model (TP)'."
        )
    config.set_inference_dtype(dtype, manual_cast)


def _assign_tensors(
    info: CheckpointInfo, model: Any, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Put the tensors into the model. A key that it lacks would make LoRAs skip that weight.

    What the architecture has not, ComfyUI's model must not have either: it is left out.
    """
    tensors = model.model_config.process_unet_state_dict(dict(state_dict))
    own = model.diffusion_model.state_dict()
    # Newer releases of ComfyUI leave them out.
    for name in info.sizes.table.unused.keys() - own.keys():
        tensors.pop(name, None)
    extra = {name: tensors.pop(name) for name in info.extra.keys() & tensors.keys()}
    strange = [
        name for name in tensors if name not in own or own[name].shape != tensors[name].shape
    ] + sorted(extra.keys() & own.keys())
    _refuse_newer(info, strange)
    if strange:
        raise CheckpointError(
            f"This ComfyUI builds {info.label} differently from the file {info.path}: "
            f"{len(strange)} tensors do not fit, such as {strange[0]}. Update ComfyUI and this "
            "pack, or load the file with the stock 'Load Diffusion Model' node."
        )
    # As where ComfyUI copies them into the model: each in the dtype of the model's own.
    tensors = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
    model.diffusion_model.load_state_dict(tensors, strict=False, assign=True)
