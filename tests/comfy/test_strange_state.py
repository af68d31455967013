"""State that other packs keep in a model's options and arguments.

What ComfyUI's own model never looks at has no effect here either; what it looks at gives its result
or is refused by name, and never an error of a codec. ComfyUI's model is called beside ours.
"""

import functools
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from comfy.conftest import largest_difference
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from support.fuzz import examples
from support.inputs import make_inputs
from support.native import native_model
from support.newer import known
from support.pack import pack_module
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import GroupConfig, TPRuntimeError, get_runtime

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-5

Pair = tuple[Any, Any]


@pytest.fixture(scope="module")
def models() -> Iterator[ModuleType]:
    with pack_module("nodes.model") as module:
        yield module
    get_runtime().release()


@pytest.fixture(scope="module")
def pair(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """ComfyUI's model of a family and ours on two ranks, as BaseModel calls them."""

    @functools.cache
    def make(family: str) -> Pair:
        path = write_tiny(family, tmp_path_factory.mktemp(family) / "tiny.safetensors")
        group, placement = GroupConfig(2, "cpu"), models.Placement()
        patcher = models.load_model(str(path), torch.float32, group, placement, "auto")
        patcher.remote.ensure_loaded()
        return native_model(path), patcher.model.diffusion_model

    return make


@functools.cache
def arguments(family: str) -> dict[str, Any]:
    more = {"num_tokens": 20} if family == "z_image" else {}
    inputs = make_inputs(tiny(family), height=8, width=8, length=20, **more)
    return {name: value for name, value in inputs.items() if name != "transformer_options"}


def outcome(model: Any, family: str, options: dict[Any, Any], more: dict[str, Any]) -> Any:
    """The prediction, or the error."""
    given = arguments(family) | more
    x, timesteps = given.pop("x"), given.pop("timesteps")
    try:
        with torch.inference_mode():
            x = pytree.tree_map(torch.clone, x)
            return model(x, timesteps, transformer_options=options, **given)
    except Exception as error:  # noqa: BLE001  (what it is, is looked at)
        return error


def agrees(found: Any, expected: Any) -> bool:
    if isinstance(found, list) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(agrees, found, expected))
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        return largest_difference(found, expected) <= TOLERANCE
    return False


class Odd:
    """An object that answers to nothing."""

    def __eq__(self, _: object) -> bool:
        raise RuntimeError("not to be compared")

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = {"x": [found]}
    return found


STRANGE: dict[str, Callable[[], Any]] = {
    "an object": Odd,
    "a class": lambda: Odd,
    "a function": lambda: lambda *_: None,
    "a module": lambda: torch.nn.Linear(2, 2),
    "bytes": lambda: b"\0\xff",
    "a set": lambda: {1, 2},
    "a fraction": lambda: Fraction(1, 3),
    "a complex number": lambda: 1j,
    "an integer without end": lambda: 10**400,
    "a lone surrogate": lambda: "\ud800",
    "a long text": lambda: "x" * 2**20,
    "a long list": lambda: [0.5] * 2**20,
    "deep data": lambda: nested(3000),
    "keys that are no text": lambda: {1: 2, (3, 4): 5, None: 6},
    "a sparse tensor": lambda: torch.eye(2).to_sparse(),
    "a tensor of no device": lambda: torch.ones(2, device="meta"),
    "a complex tensor": lambda: torch.ones(2, dtype=torch.complex64),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "a large tensor": lambda: torch.zeros(2**24),
}
UNREAD = ("easycache_state", "", "\ud800", "sigmas.next", 7, (1, 2), None, "skip_blocks")


@pytest.mark.parametrize("family", known())
def test_what_no_model_reads_has_no_effect(pair: Callable[[str], Pair], family: str) -> None:
    native, ours = pair(family)
    expected = outcome(native, family, {}, {})
    assert agrees(outcome(ours, family, {}, {}), expected)
    values = {name: make() for name, make in STRANGE.items()}
    options: dict[Any, Any] = dict.fromkeys(UNREAD, values["an object"]) | dict(values)
    options["patches"] = {"input_block_patch": Odd(), 5: Odd()}
    options["patches_replace"] = {"attn7": {("input", 1): Odd()}, None: Odd()}
    options["rope_options"] = {"foo": Odd(), 3: Odd(), "scale": "text"}
    if family == "ltx2":  # ComfyUI's forward hands the options on as keywords
        options = {name: value for name, value in options.items() if isinstance(name, str)}
    more = {f"foreign {name}": value for name, value in values.items()}
    assert agrees(outcome(native, family, dict(options), more), expected)
    assert agrees(outcome(ours, family, dict(options), more), expected)


def test_arguments_that_a_forward_takes_and_leaves(pair: Callable[[str], Pair]) -> None:
    """They are in the signature, or end in its `**kwargs`."""
    cases = [
        ("z_image", {"control": {"input": [torch.ones(1, 2, 480)]}}),
        ("z_image", {"num_tokens": Odd()}),
        ("z_image", {"denoise_mask": torch.ones(1, 1, 8, 8)}),
        ("qwen_image", {"attention_mask": torch.ones(1, 20, dtype=torch.complex64)}),
        ("flux", {"denoise_mask": Odd()}),
        ("flux", {"control": {"middle": Odd(), 7: Odd(), "input": [], "output": []}}),
    ]
    for family, more in cases:
        native, ours = pair(family)
        used_with = ours.remote.info.family.used_with
        if any(hasattr(native, used_with.get(name, "")) for name in more):
            continue  # newer releases look at it
        expected = outcome(native, family, {}, {})
        assert agrees(outcome(native, family, {}, more), expected), (family, list(more))
        assert agrees(outcome(ours, family, {}, more), expected), (family, list(more))


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("flux", {"rope_options": {"scale_y": Odd()}}, "rope_options.scale_y"),
        ("flux", {"rope_options": [1]}, "rope_options"),
        ("z_image", {"rope_options": {"shift_x": 10**400}}, "rope_options.shift_x"),
        ("flux", {"patches": [1]}, "'patches'"),
        ("flux", {"patches": {"post_input": Odd()}}, "patches.post_input"),
        ("qwen_image", {"patches_replace": {"dit": [1]}}, "patches_replace.dit"),
        ("qwen_image", {"patches_replace": {"dit": {("double_block", 0): Odd()}}}, "double_block"),
        (
            "z_image",
            {"optimized_attention_override": print},
            "takes the place of the attention function",
        ),
    ],
)
def test_what_a_model_reads_is_refused_by_name(
    pair: Callable[[str], Pair], family: str, options: dict[str, Any], words: str
) -> None:
    _, ours = pair(family)
    error = outcome(ours, family, options, {})
    assert isinstance(error, TPRuntimeError), error
    assert words in str(error)
    assert isinstance(outcome(ours, family, {}, {}), torch.Tensor)


@pytest.mark.parametrize("raised", [ValueError, KeyError, SystemExit, KeyboardInterrupt])
def test_a_replacement_that_raises_when_it_is_looked_at(
    pair: Callable[[str], Pair], raised: type[BaseException]
) -> None:
    """Whether it skips its block is found out by calling it."""

    def replacement(*_: Any) -> Any:
        raise raised("from a node's code")

    options = {"patches_replace": {"dit": {("double_block", 0): replacement}}}
    error = outcome(pair("qwen_image")[1], "qwen_image", options, {})
    assert isinstance(error, TPRuntimeError)
    assert "takes the place of a block" in str(error)


numbers = st.integers() | st.floats(allow_nan=False) | st.booleans()
leaves = st.sampled_from(sorted(STRANGE)).map(lambda name: STRANGE[name]()) | numbers | st.none()
KNOWN = (
    *("rope_options", "patches", "patches_replace", "dit", "double_block", "single_block"),
    *("scale_x", "shift_y", "block_index", "block_type", "total_blocks", "cond_or_uncond"),
)
keys = st.sampled_from(KNOWN) | st.text(max_size=4) | st.integers(0, 3)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
)
scales = st.dictionaries(
    st.sampled_from(["scale_x", "scale_y", "shift_x", "shift_y", "foo"]),
    st.floats(0.25, 4.0) | st.integers(-3, 3),
)
options_of_packs = st.dictionaries(keys, trees, max_size=4) | st.fixed_dictionaries(
    {"rope_options": scales}, optional={"state": trees}
)


@pytest.mark.parametrize("family", known())
def test_any_options(pair: Callable[[str], Pair], family: str) -> None:
    """ComfyUI's result, or one error that names the option."""
    native, ours = pair(family)

    @examples(25)
    @given(options_of_packs)
    def check(options: dict[Any, Any]) -> None:
        expected = outcome(native, family, dict(options), {})
        found = outcome(ours, family, dict(options), {})
        if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
            assert agrees(found, expected)
        elif isinstance(found, BaseException):
            assert isinstance(found, TPRuntimeError), repr(found)
            assert isinstance(expected, BaseException) or "transformer_options['" in str(found)

    check()
    assert agrees(outcome(ours, family, {}, {}), outcome(native, family, {}, {}))
