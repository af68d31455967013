"""What ComfyUI's memory management and its nodes see of a MODEL whose weights are on the ranks.

Overrides only what touches weights. `__init__` and `clone` stay ComfyUI's: their signatures grow
from release to release; for the same reason overrides take arguments that they do not name.
"""

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
from comfy.patcher_extension import CallbacksMP
from comfy_execution.utils import get_executing_context

from ..tp_runtime.client import RemoteModel
from .notices import show_group_on_node
from .proxy import REFERENCE_METHOD, is_compiled
from .unsupported import (
    cfg_split,
    code_in_model,
    data_in_model,
    reading_weights,
    weight_functions,
)
from .weights import patched_weights

_INSIDE = "diffusion_model."


class TPModelPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher over a BaseModel whose `diffusion_model` is a `RemoteDiffusionModel`."""

    loading_failed = False

    @property
    def remote(self) -> RemoteModel:
        return self.model.diffusion_model.remote

    # --- memory accounting: ComfyUI evicts its own models to make room for model_size() ---------
    # memory_required stays the BaseModel's, although activations live in the ranks: rank 0's take
    # room on the GPU that ComfyUI uses, and ComfyUI decides by it whether the two halves of a CFG
    # step share a batch, which should not depend on where the model runs.

    # A model that is only on other GPUs needs no room before it is loaded, but has a size
    # afterwards: ComfyUI would put one of size 0 to sleep first, and gain nothing by it.
    # ComfyUI asks both sizes of what stands in its books, to choose what leaves; and of what it is
    # about to load, which it takes out of the books before. Of that, what the ranks hold already
    # is nothing: newer releases let go of as many bytes of their own pinned memory.

    def model_size(self, *_args: Any, **_kwargs: Any) -> int:
        if self._is_in_books():
            return self._held_bytes()
        planned = self.remote.planned_bytes()
        return self._on_device([max(planned - held, 0) for held in self.remote.loaded_bytes()])

    def loaded_size(self, *_args: Any, **_kwargs: Any) -> int:
        return self._held_bytes() if self._is_in_books() else 0

    def _is_in_books(self) -> bool:
        return any(one.model is self for one in comfy.model_management.current_loaded_models)

    def _held_bytes(self) -> int:
        rank_bytes = self.remote.loaded_bytes()
        return self._on_device(rank_bytes) or sum(rank_bytes)

    def partially_unload(
        self, _device_to: Any = None, memory_to_free: int = 0, *_args: Any, **_kwargs: Any
    ) -> int:
        # Shards leave together: where that helps, or may help, ComfyUI then detaches the whole
        # model. Where it would not, this answer makes it go on with the next.
        may_help = self.remote.group_config.where == "ray"
        return 0 if may_help or self._on_device(self.remote.loaded_bytes()) else memory_to_free

    def _on_device(self, rank_bytes: list[int]) -> int:
        """Bytes where ComfyUI itself is: one rank's on a GPU, those of all ranks on the host.

        None on Ray's GPUs: which of them is ComfyUI's is not known.
        """
        group = self.remote.group_config
        if group.where == "ray":
            return 0
        if group.device == "cpu":
            return sum(rank_bytes)
        index = self.load_device.index or 0
        return sum(n for n, gpu in zip(rank_bytes, group.devices, strict=True) if gpu == index)

    def model_patches_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The models that ComfyUI loads beside this one: not those that the ranks compute with."""
        options = self.model_options["transformer_options"]
        ours = self.model.diffusion_model.model_patches.of(options)
        on_ranks = [model for patch in ours for model in patch.models()]
        found = super().model_patches_models(*args, **kwargs)
        return [model for model in found if not any(model is one for one in on_ranks)]

    # --- loading and freeing ---------------------------------------------------------------------

    def partially_load(self, *args: Any, **kwargs: Any) -> int:
        try:
            return int(super().partially_load(*args, **kwargs))
        except BaseException as error:
            # ComfyUI detaches what it could not load, but not after a cancel where that is no
            # Exception (newer releases), and then it does not know of the weights any more.
            if not isinstance(error, Exception):
                self.detach()
            raise

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **_kwargs: Any,
    ) -> None:
        """Have the ranks hold the weights. Cheap when they do.

        Raises:
            UnsupportedFeatureError: for what `sync_patches` refuses; and for
                `force_patch_weights`, with which ComfyUI announces that it is going to read them.
        """
        if force_patch_weights:
            raise reading_weights()
        with self.use_ejected():
            self.current_hooks = None
            self.loading_failed = True
            self._load_remote()
            self.loading_failed = False
            model = self.model
            model.to(device_to)  # model_sampling's tables
            model.device = device_to
            # "Not everything is on the device": makes ComfyUI call load before every run, so that
            # a group that has ended meanwhile is noticed here, where loading shows progress.
            model.model_lowvram = True
            model.model_loaded_weight_memory = self._held_bytes()
            model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def pre_run(self, *args: Any, **kwargs: Any) -> None:
        self._check_code()
        # ComfyUI skips load when it is short of memory and this model is loaded already.
        super().pre_run(*args, **kwargs)
        show_group_on_node(self.remote)
        self._load_remote()

    def _load_remote(self) -> None:
        self.sync_patches(self.current_hooks)
        bar: comfy.utils.ProgressBar | None = None

        def show(done: int, total: int) -> None:
            nonlocal bar
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(done, total)

        self.remote.ensure_loaded(
            poll=comfy.model_management.throw_exception_if_processing_interrupted, on_progress=show
        )

    def detach(self, unpatch_all: bool = True, *args: Any, **kwargs: Any) -> Any:
        model = super().detach(unpatch_all, *args, **kwargs)
        if unpatch_all:
            self.model.tp_outer_weights.forget()
            # ComfyUI detaches what it could not load, also because of a cancel: that waits for
            # nothing. Otherwise it is about to use the room.
            self.remote.sleep(_poll_in_prompt(), wait=not self.loading_failed)
        return model

    def unpatch_model(
        self, device_to: Any = None, unpatch_weights: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        if unpatch_weights:
            self.model.model_lowvram = False  # or every module would be searched for patches
            self.model.tp_outer_weights.patch(None, ())
            self.model.diffusion_model.give_shapes({})
        return super().unpatch_model(device_to, unpatch_weights, *args, **kwargs)

    def _load_list(self, *_args: Any, **_kwargs: Any) -> list[Any]:
        return []

    def check_code(self) -> None:
        """Raises UnsupportedFeatureError for code of nodes that `load` would refuse."""
        self.inject_model()
        try:
            self._check_code()
        finally:
            self.eject_model()

    def _check_code(self) -> None:
        """Raises UnsupportedFeatureError if a node has changed the inside of the native model.

        As object patches, or as injections (`LoraLoaderBypass`): nothing would come of it.
        """
        for name, value in self.object_patches.items():
            inside = name.startswith(_INSIDE) and name != f"{_INSIDE}forward"
            if not inside or is_compiled(value):
                continue
            if callable(value):
                raise code_in_model(name, value)
            if not name.endswith(f".{REFERENCE_METHOD}"):
                raise data_in_model(name, value)
        self.model.diffusion_model.check_code()

    # --- weights ---------------------------------------------------------------------------------

    def sync_patches(self, hooks: Any = None) -> None:
        """Have the ranks use the weights that this MODEL's patches and `hooks` ask for.

        They change them when the model is evaluated next, or loaded: hooks that follow the steps
        set the same weights several times.

        Raises:
            UnsupportedFeatureError, InputError: for what is no LoRA, or changes shapes that it
                cannot.
        """
        if self.weight_wrapper_patches:
            raise weight_functions(len(self.weight_wrapper_patches))
        hook_patches = self.get_combined_hook_patches(hooks)
        outer = self.model.tp_outer_weights
        if not self.patches and not hook_patches:
            self.remote.patch(None, {})
            outer.patch(None, ())
            self._show_shapes()
            return
        strengths = tuple((hook.hook_ref, hook.strength) for hook in hooks.hooks) if hooks else ()
        version = (self.patches_uuid, strengths)
        loaded = self.model.diffusion_model.patched_by_module
        own = {key: of for key, of in self.patches.items() if key in loaded}
        if version != self.remote.version:
            patches = patched_weights(self.remote.info, own, hook_patches)
            self.remote.patch(version, patches)
        outer.patch(version, (own, hook_patches))
        self._show_shapes()

    def _show_shapes(self) -> None:
        """Have the weights look as large as the patches make them."""
        patches = self.remote.patches
        shapes = {name: one.shape for name, one in patches.items() if one.shape is not None}
        self.model.diffusion_model.give_shapes(shapes)

    def patch_hooks(self, hooks: Any, *_args: Any, **_kwargs: Any) -> None:
        self.sync_patches(hooks)
        self.current_hooks = hooks

    def get_key_patches(self, *_args: Any, **_kwargs: Any) -> Any:
        raise reading_weights()

    def patch_weight_to_device(self, *_args: Any, **_kwargs: Any) -> Any:
        raise reading_weights()

    def model_state_dict_for_saving(self, *_args: Any, **_kwargs: Any) -> Any:
        raise reading_weights()

    def deepclone_multigpu(self, *_args: Any, **_kwargs: Any) -> Any:
        raise cfg_split()


def _poll_in_prompt() -> Callable[[], None] | None:
    """ComfyUI's check for a cancel, while a node runs; what it raises would end the queue's thread.

    Memory is also freed outside of any prompt.
    """
    if get_executing_context() is None:
        return None
    return comfy.model_management.throw_exception_if_processing_interrupted
