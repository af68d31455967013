"""What a refusal says of the Python code of a node, and what need not be refused."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.pack import pack_module

pytestmark = pytest.mark.comfy


class OfPack:
    """A patch that is an object, as a node pack's."""

    def __call__(self, x: Any) -> Any:
        return x


class StockNode:
    """As a node of ComfyUI."""

    @staticmethod
    def execute() -> Callable[[Any], Any]:
        def attention_patch(x: Any) -> Any:
            return x

        return attention_patch


@pytest.fixture(scope="module")
def origins() -> Iterator[ModuleType]:
    with pack_module("nodes.origins") as module:
        yield module


def of_module(code: Any, module: str) -> Any:
    code.__module__ = module
    return code


def chosen(attention: Callable[..., Any]) -> Callable[..., Any]:
    """What `set_model_optimized_attention` of newer releases makes of a choice."""
    optimized_attention = attention

    def override(_: Any, *args: Any, **kwargs: Any) -> Any:
        return optimized_attention(*args, **kwargs)

    return of_module(override, "comfy.model_patcher")  # type: ignore[no-any-return]


def sage_attention(*_: Any) -> None:
    """Rounds its inputs."""


def test_the_node_and_the_module_are_said(origins: ModuleType) -> None:
    patch = of_module(StockNode.execute(), "comfy_extras.nodes_nag")
    assert origins.describe(patch) == (
        "attention_patch of StockNode (comfy_extras.nodes_nag of ComfyUI)"
    )
    assert origins.describe(functools.partial(patch, 1)) == origins.describe(patch)


@pytest.mark.parametrize("module", ["/x/custom_nodes/Some-Pack.nodes", "/x/custom_nodes/Some-Pack"])
def test_the_node_pack_is_said(
    origins: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setattr(OfPack, "__module__", module)
    assert origins.describe(OfPack()) == "OfPack (of the node pack Some-Pack)"


def test_exact_attention_is_no_reason_to_refuse(origins: ModuleType) -> None:
    from comfy.ldm.modules import attention

    registered = attention.REGISTERED_ATTENTION_FUNCTIONS
    assert origins.is_exact_attention(chosen(registered["pytorch"]))
    assert origins.is_exact_attention(chosen(registered["sub_quad"]))
    assert not origins.is_exact_attention(chosen(sage_attention))
    assert not origins.is_exact_attention(of_module(chosen(registered["pytorch"]), "a_pack"))


def test_what_leaves_the_process(origins: ModuleType) -> None:
    """A choice of exact attention does not, another is refused with the name of what was chosen."""
    from comfy.ldm.modules import attention

    def forward(x: int, timesteps: int, transformer_options: dict[str, Any]) -> None:
        """Of a model that looks for such a choice."""

    with pack_module("nodes.arguments") as arguments, pack_module("nodes.native_code") as native:
        option = "optimized_attention_override"
        code = native.NativeCode(frozenset(), frozenset(), frozenset({option}))

        def sent(choice: Any) -> Any:
            bound = inspect.signature(forward).bind(1, 2, {option: chosen(choice)})
            return arguments.remote_inputs(bound, code)["transformer_options"]

        assert sent(attention.REGISTERED_ATTENTION_FUNCTIONS["pytorch"]) == {}
        with pytest.raises(ValueError, match=r"sage_attention \(.*the place of the attention"):
            sent(sage_attention)


@pytest.mark.parametrize("has_references", [False, True])
def test_a_cache_of_reference_images_does_nothing_without_any(has_references: bool) -> None:
    class KV_Attn_Input:
        def __call__(self, *_: Any) -> dict[str, torch.Tensor]:
            return {}

    KV_Attn_Input.__module__, KV_Attn_Input.__qualname__ = "comfy_extras.nodes", "KV_Attn_Input"
    with pack_module("nodes.block_patches") as patches:
        options = {"patches": {"attn1_patch": [KV_Attn_Input()]}}
        known = frozenset({"attn1_patch"})
        if has_references:
            with pytest.raises(ValueError, match="KV_Attn_Input"):
                patches.skipped_blocks(options, known, has_references)
        else:
            assert patches.skipped_blocks(options, known, has_references) == {}


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("comfy_extras.nodes_flux", "comfy_extras.nodes_flux"),
        ("/opt/ComfyUI/comfy_extras/nodes_flux", "comfy_extras.nodes_flux"),
        ("/opt/my_x_apps/ComfyUI/comfy_extras/nodes_flux", "comfy_extras.nodes_flux"),
        ("/opt/ComfyUI/custom_nodes/a_pack/comfy_extras/nodes_flux", ""),
        ("/opt/ComfyUI/custom_nodes/a_pack", ""),
        ("comfy.ldm.flux.model", ""),
    ],
)
def test_modules_of_comfyuis_own_nodes(origins: ModuleType, module: str, found: str) -> None:
    """Newer releases name them by their files' paths."""
    assert origins.module_of_nodes(module) == found


FAMILY = """
import torch

def positions(transformer_options):
    return transformer_options.get("beside", {}).get("a_word")

class Model(torch.nn.Module):
    def forward(self, x, timesteps, **kwargs):
        positions(kwargs.get("transformer_options", {}))
        return x
"""


def test_functions_beside_the_model_read_options_too(tmp_path: Path) -> None:
    """Since 0.33 Z-Image's positions are computed by one."""
    (tmp_path / "a_family.py").write_text(FAMILY)
    name = "comfy.ldm.a_family"
    spec = importlib.util.spec_from_file_location(name, tmp_path / "a_family.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pack_module("nodes.native_code") as native, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        code = native.NativeCode.of(module.Model())
    assert "beside" in code.options
    assert "a_word" in code.words
    assert "transformer_options" in code.arguments


@pytest.mark.parametrize("module", ["comfy_extras.nodes_flux", "/opt/C/comfy_extras/nodes_flux"])
def test_a_reference_cache_is_known_by_either_name(origins: ModuleType, module: str) -> None:
    class KV_Attn_Input:
        def __call__(self) -> None: ...

    KV_Attn_Input.__qualname__ = "KV_Attn_Input"
    assert origins.is_of_reference_cache(of_module(KV_Attn_Input, module)())
    assert "comfy_extras.nodes_flux of ComfyUI" in origins.describe(KV_Attn_Input())
