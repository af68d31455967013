"""The weightless stand-in for a native diffusion model: its forward runs on the ranks."""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import comfy.model_management
import torch

from ..tp_runtime.client import MODEL_PATCHES, STYLE_TOKENS, RemoteModel
from .absent import give_shapes
from .arguments import remote_inputs
from .known_conditions import known_as
from .model_patches import ModelPatches
from .native_code import NativeCode
from .style_tokens import StyleTokens
from .together import Meeting
from .unsupported import (
    code_in_model,
    gradients,
    model_of_other_group,
    other_compute_dtype,
    refused_input,
)
from .weights import patched_by_module

# How reference images are placed where a caption does not say it: an attribute of native models (of
# FLUX's `params`) that nodes may set (FluxKVCache).
REFERENCE_METHOD = "default_ref_method"
_OPTIONS = "transformer_options"
# The model that a sampler's step evaluates.
_sampled: contextvars.ContextVar[RemoteModel | None] = contextvars.ContextVar(
    "sampled", default=None
)


class RemoteDiffusionModel(torch.nn.Module):
    """Looks like `skeleton`, a native diffusion model without weights; computes on `remote`.

    It has no parameters of its own, so nothing that walks over modules moves, casts or counts any.
    Attributes that it lacks are the skeleton's (samplers and nodes read `patch_size`, ...), and so
    are the names and shapes in `state_dict` (LoRA loaders make their key maps of them).
    """

    def __init__(self, skeleton: torch.nn.Module, remote: RemoteModel) -> None:
        super().__init__()
        # Around nn.Module.__setattr__, which would make the skeleton a submodule.
        object.__setattr__(self, "skeleton", skeleton)
        self.remote = remote
        self.native_signature = inspect.signature(skeleton.forward)
        self.native_code = NativeCode.of(skeleton)
        self.model_patches = ModelPatches(remote)
        self.style_tokens = StyleTokens(remote)
        self._larger: set[str] = set()  # weights that are so by patches
        native = type(skeleton)
        self._native_methods = {name for name in dir(native) if callable(getattr(native, name))}
        self.eval()

    def __getattr__(self, name: str) -> Any:
        # Called only for what is not found otherwise.
        family = self.__dict__["remote"].info.family
        if name in family.left_to_ranks:
            return _unchanged
        if name == family.connects:
            return self._connected
        return getattr(self.__dict__["skeleton"], name)

    @property
    def weight_function(self) -> NoReturn:
        """Where layers keep functions on their weights: training nodes ask every module for it."""
        raise gradients()

    def give_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Have these weights look so large, and all others as they are in the file.

        ComfyUI's model looks how many channels its input takes, to know what to concatenate.
        """
        before = {name: self.remote.info.tensors[name].shape for name in self._larger}
        give_shapes(self.skeleton, before | dict(shapes))
        self._larger = set(shapes)

    @functools.cached_property
    def patched_by_module(self) -> frozenset[str]:
        """The keys of the weights that ComfyUI patches when it loads the model."""
        return frozenset(f"diffusion_model.{name}" for name in patched_by_module(self.skeleton))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.skeleton.state_dict(*args, **kwargs)

    def _apply(self, *_args: Any, **_kwargs: Any) -> "RemoteDiffusionModel":
        return self

    @torch.compiler.disable  # the ranks compile; a node that compiles the model changes nothing
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The native forward, with `_forward` on the ranks.

        It has the wrappers called, and does what a model does outside of them.
        """
        native = type(self.skeleton).forward
        calls_super = "__class__" in native.__code__.co_freevars
        return native(_AsNative(self) if calls_super else self, *args, **kwargs)

    def check_code(self) -> None:
        """Raises UnsupportedFeatureError if code was put into the skeleton, which nobody runs."""
        self._check_methods()
        for name, module in self.skeleton.named_modules():
            if is_compiled(module):
                continue
            forward = vars(module).get("forward")
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if _is_foreign(forward, type(module).forward):
                raise code_in_model(name, forward)
            if hooks:
                raise code_in_model(name, hooks[0])

    def _check_methods(self) -> None:
        # `forward` itself is called, and hooks on this module are.
        for name in self._native_methods & vars(self).keys() - {"forward"}:
            if _is_foreign(vars(self)[name], getattr(type(self.skeleton), name)):
                raise code_in_model(name, vars(self)[name])

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        asked = _sampled.get()
        own = self.remote
        if asked is not None and asked.spec == own.spec and asked.group_id != own.group_id:
            raise model_of_other_group(str(asked.group_config.num_ranks))
        self._check_methods()  # some nodes replace them during an evaluation
        bound = self.native_signature.bind(*args, **kwargs)
        holder = _holder_of_options(bound)
        patches = self._take_patches(bound, holder)
        # Nodes may give the patches anything at any step.
        known = None if patches else known_as(self.remote, holder.get(_OPTIONS))
        family, sizes = self.remote.info.family, self.remote.info.sizes
        numbers = {
            name: getattr(self.skeleton, attribute) for name, attribute in family.numbers.items()
        }
        inputs = remote_inputs(
            bound,
            self.native_code,
            sizes.unused_inputs,
            sizes.options,
            numbers,
            sizes.plain_options,
        )
        for name, attribute in family.used_with.items():
            if not hasattr(self.skeleton, attribute):
                inputs.pop(name, None)
        for name in inputs.keys() & family.refused_inputs.keys():
            raise refused_input(self.remote.info.label, name, family.refused_inputs[name])
        method = self._reference_method()
        if method is not None and "ref_latents" in inputs:
            inputs.setdefault("ref_latents_method", method)
        inputs |= patches
        x = inputs["x"]
        latents = [x] if isinstance(x, torch.Tensor) else x
        for latent in latents:
            self._check_kind(latent)
        meeting = Meeting.of_this_thread(self.remote)
        if meeting is not None:
            result = meeting.evaluate((inputs, known))
        else:
            poll = comfy.model_management.throw_exception_if_processing_interrupted
            result = self.remote.evaluate(inputs, poll, known_as=known)
        if isinstance(x, torch.Tensor):
            return result.to(device=x.device, dtype=x.dtype)
        found = [
            one.to(device=latent.device, dtype=latent.dtype)
            for one, latent in zip(result, latents, strict=True)
        ]
        return found if len(found) > 1 else found[0]  # as native models have it

    def _take_patches(
        self, bound: inspect.BoundArguments, holder: dict[str, Any]
    ) -> dict[str, Any]:
        """Objects of nodes that the ranks compute with: out of the options, as inputs."""
        if not holder.get(_OPTIONS):
            return {}
        x = next(iter(bound.arguments.values()))
        holder[_OPTIONS], patches = self.model_patches.taken(holder[_OPTIONS], x)
        holder[_OPTIONS], tokens = self.style_tokens.taken(holder[_OPTIONS], x)
        found = {MODEL_PATCHES: patches, STYLE_TOKENS: tokens}
        return {name: listed for name, listed in found.items() if listed}

    def _connected(self, caption: torch.Tensor, unprocessed: bool = False) -> torch.Tensor:
        """What the native model makes of a caption before a generation, made by the ranks."""
        self._check_kind(caption)
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        found = self.remote.connected(caption, poll, unprocessed=unprocessed)
        return found.to(device=caption.device, dtype=caption.dtype)

    def _reference_method(self) -> str | None:
        holders = (self, getattr(self, "params", None))
        found = [getattr(holder, REFERENCE_METHOD, None) for holder in holders]
        return next((method for method in found if method is not None), None)

    def _check_kind(self, tensor: torch.Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != self.remote.spec.compute_dtype:
            raise other_compute_dtype(dtype, self.remote.spec.compute_dtype)
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise gradients()


def _holder_of_options(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments by name among which the options are: those that have a name, or the others."""
    others = [
        bound.arguments[parameter.name]
        for parameter in bound.signature.parameters.values()
        if parameter.kind is parameter.VAR_KEYWORD and parameter.name in bound.arguments
    ]
    found = (one for one in (bound.arguments, *others) if one.get(_OPTIONS))
    return next(found, bound.arguments)


class _AsNative:
    """A proxy as an instance of its native class: `super()` in that one's forward asks for one."""

    def __init__(self, proxy: RemoteDiffusionModel) -> None:
        self._proxy = proxy

    @property
    def __class__(self) -> type:
        return type(self._proxy.skeleton)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proxy, name)


def _unchanged(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    """What the model would make of it here, the ranks make."""
    return value


@contextlib.contextmanager
def sampled(remote: RemoteModel) -> Iterator[None]:
    """In the body, a step of a sampler evaluates that model."""
    token = _sampled.set(remote)
    try:
        yield
    finally:
        _sampled.reset(token)


def is_compiled(value: Any) -> bool:
    """Whether that is what `torch.compile` makes of a module: it computes what the module does."""
    return hasattr(value, "_orig_mod")


def _is_foreign(found: Any, own: Any) -> bool:
    """Whether an object has something in the place of its class's method.

    ComfyUI takes an object patch back by setting the method itself.
    """
    return found is not None and getattr(found, "__func__", None) is not own
