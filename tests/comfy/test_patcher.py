"""What ComfyUI's own code does with our MODEL where this machine or this release cannot show it.

GPUs that are not ComfyUI's, a cancel that is no Exception, and nodes of newer releases. ComfyUI's
code is real; the ranks are not started.
"""

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from support.pack import pack_module
from support.tiny_models import write_tiny
from tp_runtime.client import GroupConfig, RemoteModel

pytestmark = pytest.mark.comfy

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def patcher(unstarted: Callable[..., Any], tiny_z_image: Path) -> Any:
    """A MODEL on two ranks that need not be started."""
    return unstarted(tiny_z_image, GroupConfig(2, "cpu"))


# --- code that nodes put into the model ----------------------------------------------------------


def inside(*_: Any, **__: Any) -> None:
    """What a node puts there."""


def of_bypass(*_: Any, **__: Any) -> None:
    """What LoraLoaderBypass of newer releases puts there."""


of_bypass.__module__ = "comfy.weight_adapter.bypass"


def sample(patcher: Any, noise: torch.Tensor, caption: Any) -> torch.Tensor:
    import comfy.sample

    how = (1, 1.0, "euler", "simple", caption, caption, torch.zeros_like(noise))
    found: torch.Tensor = comfy.sample.sample(patcher, noise, *how, seed=7)
    return found


def by_object_patch(patcher: Any) -> None:
    patcher.add_object_patch("diffusion_model.layers.0.attention.forward", inside)


def by_replacing_a_module(patcher: Any) -> None:
    patcher.add_object_patch("diffusion_model.layers.0", torch.nn.Identity())


def by_injection(patcher: Any) -> None:
    """As comfy/weight_adapter/bypass.py of newer releases does for LoraLoaderBypass."""
    from comfy.patcher_extension import PatcherInjection

    linear = patcher.model.diffusion_model.layers[0].attention.qkv

    def inject(_: Any) -> None:
        linear.forward = of_bypass

    def eject(_: Any) -> None:
        del linear.forward

    patcher.set_injections("bypass_lora", [PatcherInjection(inject=inject, eject=eject)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (by_object_patch, r": inside \(.*test_patcher\)"),
        (by_replacing_a_module, r": Identity \(torch\.nn\.modules\.linear\)"),
        (by_injection, r": of_bypass \(comfy.*of ComfyUI\).*Load the LoRA without bypass"),
    ],
)
def test_code_in_the_model_is_refused(
    patcher: Any, change: Callable[[Any], None], words: str
) -> None:
    changed = patcher.clone()
    change(changed)
    changed.partially_load(CPU, 1e32)
    with pytest.raises(ValueError, match=rf"replaced '.*layers\.0.*{words}"):
        changed.pre_run()
    changed.detach(unpatch_all=False)  # what ComfyUI does when another clone is to run
    patcher.partially_load(CPU, 1e32)
    patcher.pre_run()


@pytest.mark.parametrize(("value", "words"), [(7, "to 7"), (torch.ones(2), "to a Tensor")])
def test_another_setting_of_the_model_is_refused(patcher: Any, value: object, words: str) -> None:
    """As newer releases set what a LoRA's file says of the model."""
    changed = patcher.clone()
    changed.add_object_patch("diffusion_model.patch_size", value)
    changed.partially_load(CPU, 1e32)
    with pytest.raises(ValueError, match=rf"set 'diffusion_model\.patch_size' .*{words}"):
        changed.pre_run()
    changed.detach(unpatch_all=False)
    patcher.partially_load(CPU, 1e32)
    patcher.pre_run()


def test_hooks_and_methods_are_refused(patcher: Any) -> None:
    model = patcher.model.diffusion_model
    hook = model.layers[0].register_forward_hook(inside)
    with pytest.raises(ValueError, match=r"replaced 'layers\.0'"):
        patcher.pre_run()
    hook.remove()
    model.patchify_and_embed = inside
    with pytest.raises(ValueError, match="replaced 'patchify_and_embed'"):
        patcher.pre_run()
    with pytest.raises(ValueError, match="replaced 'patchify_and_embed'"):  # meanwhile, too
        model(torch.zeros(1, 16, 8, 8), torch.ones(1), torch.zeros(1, 4, 64), 4)
    del model.patchify_and_embed
    patcher.pre_run()


def test_modules_may_be_compiled(patcher: Any) -> None:
    """It is of no use, and does no harm."""
    layers = patcher.model.diffusion_model.layers
    patcher.add_object_patch("diffusion_model.layers.0", torch.compile(layers[0]))
    patcher.partially_load(CPU, 1e32)
    patcher.pre_run()
    layers[1] = torch.compile(layers[1])
    patcher.pre_run()


def test_forward_may_be_replaced(patcher: Any) -> None:
    """It is what ComfyUI calls."""
    patcher.add_object_patch("diffusion_model.forward", lambda x, *_, **__: 2 * x)
    patcher.partially_load(CPU, 1e32)
    patcher.pre_run()
    assert patcher.model.diffusion_model(torch.ones(1)) == 2


# --- another group, as TP Sampler chooses it -----------------------------------------------------


def test_what_was_put_into_the_loaders_model_is_refused_on_another_group(
    patcher: Any, models: ModuleType
) -> None:
    """The other group's model does not have it: a LoRA would be left out without a word."""
    changed = patcher.clone()
    by_injection(changed)
    with pytest.raises(ValueError, match="Load the LoRA without bypass"):
        models.on_group(changed, GroupConfig(1, "cpu"))
    assert not changed.is_injected
    assert models.on_group(patcher, GroupConfig(1, "cpu")).remote.group_config.num_ranks == 1


def test_what_compiles_the_loaders_model_does_not_bring_it_to_another_group(
    patcher: Any, models: ModuleType
) -> None:
    from comfy.patcher_extension import WrappersMP
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    changed = patcher.clone()
    set_torch_compile_wrapper(changed, backend="eager")
    model = changed.get_model_object("diffusion_model")
    changed.add_object_patch("diffusion_model", torch.compile(model, backend="eager"))
    assert changed.get_all_wrappers(WrappersMP.APPLY_MODEL)
    other = models.on_group(changed, GroupConfig(1, "cpu"))
    assert not other.get_all_wrappers(WrappersMP.APPLY_MODEL)
    assert other.get_model_object("diffusion_model") is other.model.diffusion_model
    assert "diffusion_model" in changed.object_patches


def test_code_that_calls_the_loaders_model_is_refused_on_another_group(
    patcher: Any, models: ModuleType
) -> None:
    own = patcher.get_model_object("diffusion_model.forward")
    patcher.add_object_patch("diffusion_model.forward", lambda *args, **more: own(*args, **more))
    other = models.on_group(patcher, GroupConfig(1, "cpu"))
    other.partially_load(CPU, 1e32)
    noise, caption = torch.zeros(1, 16, 8, 8), [[torch.zeros(1, 4, 64), {}]]
    with pytest.raises(ValueError, match="TP Sampler has gpu_count 1, but a node before it"):
        sample(other, noise, caption)


# --- cancelling ----------------------------------------------------------------------------------


class NewCancel(BaseException):
    """ComfyUI's InterruptProcessingException is an Exception in 0.3.75, but not in all releases."""


class OldCancel(Exception):
    """As it is in 0.3.75."""


@pytest.mark.parametrize("cancel", [NewCancel, OldCancel])
def test_a_load_that_is_cancelled_leaves_no_weights_behind(
    patcher: Any, monkeypatch: pytest.MonkeyPatch, cancel: type[BaseException]
) -> None:
    """ComfyUI does not know of them, so that it could not free them later."""

    def interrupted(**_: Any) -> None:
        raise cancel

    waits = []
    monkeypatch.setattr(patcher.remote, "ensure_loaded", interrupted)
    monkeypatch.setattr(patcher.remote, "sleep", lambda *_, wait: waits.append(wait))
    with pytest.raises(cancel):
        patcher.partially_load(CPU, 1e32)
    assert waits == [False]


# --- memory --------------------------------------------------------------------------------------


class Machine:
    """ComfyUI's books of its GPU, cuda:0, as its memory management keeps them."""

    def __init__(self, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
        import comfy.model_management

        self.management = comfy.model_management
        self.device = torch.device("cuda:0")
        self.free = free
        self.freed: list[str] = []

        def free_memory(_: Any = None, torch_free_too: bool = False) -> Any:
            return (self.free, 0) if torch_free_too else self.free

        monkeypatch.setattr(self.management, "get_free_memory", free_memory)
        monkeypatch.setattr(self.management, "soft_empty_cache", lambda *_: None)
        monkeypatch.setattr(self.management, "current_loaded_models", [])

    def take(self, patcher: Any) -> None:
        """The model has been loaded."""
        loaded = self.management.LoadedModel(patcher)
        loaded.real_model = weakref.ref(patcher.model)
        loaded.model_finalizer = weakref.finalize(patcher.model, lambda: None)
        self.management.current_loaded_models.append(loaded)

    def stock_model(self, size: int) -> Any:
        """One of ComfyUI's own, of so many bytes."""
        import comfy.model_patcher

        model = torch.nn.Module()
        model.device = self.device
        patcher = comfy.model_patcher.ModelPatcher(model, self.device, CPU)
        patcher.model_size = patcher.loaded_size = lambda *_: size

        def detach(*_: Any, **__: Any) -> None:
            self.freed.append("stock")
            self.free += size

        patcher.detach = detach
        return patcher


def on_gpus(
    patcher: Any,
    devices: tuple[int, ...],
    rank_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    where: str = "this machine",
) -> RemoteModel:
    """As if the MODEL were on these two GPUs, with so many bytes loaded on each."""
    remote: RemoteModel = patcher.remote
    config = dataclasses.replace(remote.group_config, device="cuda", devices=devices, where=where)
    monkeypatch.setattr(remote._group, "config", config)
    monkeypatch.setattr(remote, "loaded_bytes", lambda: [rank_bytes] * 2)
    monkeypatch.setattr(patcher, "load_device", torch.device("cuda:0"))
    monkeypatch.setattr(patcher.model, "device", torch.device("cuda:0"))
    monkeypatch.setattr(patcher.model, "to", lambda *_, **__: None)
    return remote


def test_comfyui_does_not_free_what_is_on_other_gpus(
    patcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would move tens of GiB for nothing; 'Unload models' still reaches them."""
    machine = Machine(2 * GIB, monkeypatch)
    remote = on_gpus(patcher, (1, 2), 20 * GIB, monkeypatch)
    monkeypatch.setattr(remote, "sleep", lambda *_, **__: machine.freed.append("ours"))
    stock = machine.stock_model(10 * GIB)
    _held = [stock] * 100  # ComfyUI begins with what is referred to least
    for one in (patcher, stock):
        machine.take(one)
    machine.management.free_memory(6 * GIB, machine.device)
    assert machine.freed == ["stock"]
    machine.management.free_memory(8 * GIB, machine.device)
    assert machine.freed == ["stock"]
    machine.management.free_memory(1e30, machine.device)
    assert machine.freed == ["stock", "ours"]


def test_comfyui_frees_what_is_on_its_gpu(patcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(2 * GIB, monkeypatch)
    remote = on_gpus(patcher, (1, 0), 20 * GIB, monkeypatch)
    monkeypatch.setattr(remote, "sleep", lambda *_, **__: machine.freed.append("ours"))
    machine.take(patcher)
    assert patcher.loaded_size() == 20 * GIB
    machine.management.free_memory(6 * GIB, machine.device)
    assert machine.freed == ["ours"]


def test_comfyui_frees_what_may_be_on_its_gpu(
    patcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which GPUs Ray has chosen is not known here."""
    machine = Machine(2 * GIB, monkeypatch)
    remote = on_gpus(patcher, (), 20 * GIB, monkeypatch, where="ray")
    monkeypatch.setattr(remote, "sleep", lambda *_, **__: machine.freed.append("ours"))
    machine.take(patcher)
    machine.management.free_memory(6 * GIB, machine.device)
    assert machine.freed == ["ours"]


@pytest.mark.parametrize(("devices", "needed"), [((1, 2), False), ((0, 1), True)])
def test_room_is_made_for_what_comes_to_comfyuis_gpu(
    patcher: Any, monkeypatch: pytest.MonkeyPatch, devices: tuple[int, ...], needed: bool
) -> None:
    Machine(2 * GIB, monkeypatch)
    remote = on_gpus(patcher, devices, 0, monkeypatch)
    monkeypatch.setattr(patcher.model, "device", CPU)
    import comfy.model_management

    loaded = comfy.model_management.LoadedModel(patcher)
    assert loaded.model_memory_required(patcher.load_device) == needed * remote.planned_bytes()
    # Another MODEL of the file has had the weights loaded: nothing more is needed.
    monkeypatch.setattr(remote, "loaded_bytes", lambda: [GIB, GIB])
    assert loaded.model_memory_required(patcher.load_device) == 0


def test_what_is_loaded_needs_no_pinned_memory(
    patcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer releases free as much of their text encoders' as `model_memory`, at every prompt."""
    machine = Machine(40 * GIB, monkeypatch)
    remote = on_gpus(patcher, (0, 1), 20 * GIB, monkeypatch)
    monkeypatch.setattr(remote, "ensure_loaded", lambda **_: None)
    asked: list[dict[str, Any]] = []
    free_memory = machine.management.free_memory

    def record(needed: float, device: torch.device, **options: Any) -> Any:
        asked.append({"needed": needed} | options)
        return free_memory(needed, device, **options)

    monkeypatch.setattr(machine.management, "free_memory", record)
    assert machine.management.LoadedModel(patcher).model_memory() == 0
    for _ in range(2):  # loaded by another MODEL of the file, then by itself
        machine.management.load_models_gpu([patcher], minimum_memory_required=GIB)
    assert [one.model for one in machine.management.current_loaded_models] == [patcher]
    assert len(asked) == 2
    for one in asked:
        assert one["needed"] < 2 * GIB
        assert one.get("pins_required", 0) == 0


# --- what ComfyUI asks before it runs a loader ---------------------------------------------------


@pytest.mark.parametrize(
    "linked", ["unet_name", "gpu_count", "devices", "layout", "where", "precision"]
)
def test_a_linked_input_does_not_make_the_loader_run_again(
    tiny_z_image: Path, monkeypatch: pytest.MonkeyPatch, linked: str
) -> None:
    """ComfyUI gives None for it; what raises would be another value each time."""
    with pack_module("nodes.loader") as loader:
        monkeypatch.setattr(loader, "model_path", lambda _: str(tiny_z_image))
        inputs: dict[str, Any] = {"unet_name": "x", "gpu_count": "2", "weight_dtype": "default"}
        fingerprint = loader.TPLoadDiffusionModel.fingerprint_inputs
        first = fingerprint(**inputs | {linked: None})
        assert fingerprint(**inputs | {linked: None}) == first
        assert isinstance(first, str)


# --- model patches -------------------------------------------------------------------------------


def test_what_the_ranks_compute_with_is_not_loaded_here(models: ModuleType, tmp_path: Path) -> None:
    """ComfyUI loads a model patch beside its model, on its own device; another one still is."""
    from comfy_extras.nodes_model_patch import (
        DiffSynthCnetPatch,
        QwenImageBlockWiseControlNet,
        UsoStyleProjectorPatch,
    )

    path = write_tiny("qwen_image", tmp_path / "tiny.safetensors")
    patcher = models.load_model(
        str(path), torch.float32, GroupConfig(2, "cpu"), models.Placement(), "auto"
    )
    control, other = object.__new__(DiffSynthCnetPatch), object.__new__(UsoStyleProjectorPatch)
    small = QwenImageBlockWiseControlNet(num_layers=1, dim=16, operations=torch.nn)
    control.encoded_image = other.encoded_image = torch.zeros(1)
    control.model_patch, other.model_patch = SimpleNamespace(model=small), SimpleNamespace()
    patcher.set_model_double_block_patch(control)
    patcher.set_model_post_input_patch(other)
    assert patcher.model_patches_models() == [other.model_patch]


def test_how_wide_a_weight_looks(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wide as a LoRA makes it while the MODEL with it is loaded; ComfyUI's model looks at it."""
    import comfy.weight_adapter

    path = write_tiny("flux", tmp_path / "flux.safetensors")
    group, placement = GroupConfig(2, "cpu"), models.Placement()
    plain = models.load_model(str(path), torch.float32, group, placement, "auto")
    monkeypatch.setattr(plain.remote, "ensure_loaded", lambda **_: None)
    model = plain.model.diffusion_model
    rows, columns = model.img_in.weight.shape
    factors = torch.ones(rows, 2), torch.ones(2, 2 * columns)
    lora = comfy.weight_adapter.LoRAAdapter(set(), (*factors, *3 * (None,), [rows, 2 * columns]))
    wide = plain.clone()
    wide.add_patches({"diffusion_model.img_in.weight": lora})

    def shapes() -> set[tuple[int, ...]]:
        """As it says, as a state dict says, and of its true values."""
        weight, listed = model.img_in.weight, model.state_dict()["img_in.weight"]
        return {tuple(one.shape) for one in (weight, listed, weight + 0)}

    for _ in range(2):
        wide.partially_load(CPU, 1e32)
        assert shapes() == {(rows, 2 * columns)}
        wide.detach(unpatch_all=False)
        plain.partially_load(CPU, 1e32)
        assert shapes() == {(rows, columns)}
    wide.partially_load(CPU, 1e32)
    wide.detach()
    assert shapes() == {(rows, columns)}
