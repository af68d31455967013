"""Any inputs that a family takes, on any number of ranks: ComfyUI's result, or one error.

`make soak` tries many, at random.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from parity.suite import native

from support.fuzz import examples
from support.inputs import make_inputs
from support.newer import known
from support.tiny_models import tiny, write_tiny

pytestmark = pytest.mark.process

METHODS = {"flux": ("offset", "index", "uxo"), "flux2": ("index", "offset", "uxo")}
METHODS["qwen_image"] = ("index", "offset", "uxo")
METHODS["krea2"] = ("index", "uxo", "index_timestep_zero")
WITHOUT_METHODS = ("qwen_image_21",)  # references, and places for them in the text
sides = st.integers(2, 20)


@st.composite
def inputs_of(draw: Callable[[Any], Any], family: str) -> dict[str, Any]:
    sizes = tiny(family)
    geometry = sizes.geometry
    given_ones: dict[str, Any] = {
        "batch": draw(st.integers(1, 3)),
        "height": draw(sides),
        "width": draw(sides),
        "length": draw(st.integers(1, 70)),
    }
    # Qwen-Image's class of ComfyUI 0.3.75 takes one frame: `test_newer_comfyui` has several.
    if geometry.video and geometry.num_frames is None and family != "qwen_image":
        given_ones |= {"frames": draw(st.integers(1, 5)), "time_scale": 1000.0}
    if family in (*METHODS, *WITHOUT_METHODS):
        given_ones["references"] = draw(st.lists(st.tuples(sides, sides), max_size=3))
    if family in WITHOUT_METHODS:
        places = st.lists(st.integers(0, given_ones["length"]), max_size=4)
        given_ones["image_slots"] = sorted(draw(places))
    elif family in METHODS and given_ones["references"]:
        given_ones["ref_latents_method"] = draw(st.sampled_from(METHODS[family]))
    optional = [name for name, one in sizes.inputs.items() if one.optional and name != "context"]
    given_ones["without"] = draw(st.sets(st.sampled_from(optional))) if optional else ()
    if family == "z_image":
        given_ones["num_tokens"] = given_ones["length"]
    return make_inputs(sizes, **given_ones)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tiny")

    def written(family: str) -> Path:
        path = folder / f"{family}.safetensors"
        return path if path.exists() else write_tiny(family, path)

    return written


@pytest.mark.rotates(5)
@pytest.mark.parametrize("family", known())
@pytest.mark.parametrize("tp_size", [2, "padded", 4])
def test_any_inputs(
    file: Callable[[str], Path], remote: Remote, family: str, tp_size: int | str
) -> None:
    heads = tiny(family).num_heads
    valid = tiny(family).table.plan.valid_tp_sizes(6)
    padded = [size for size in valid if heads % size]
    size = tp_size if isinstance(tp_size, int) else min(padded)
    path = file(family)
    model = remote(path, size)

    @examples(8)
    @given(inputs_of(family))
    def check(inputs: dict[str, Any]) -> None:
        found = model.evaluate(inputs)
        assert relative_error(found, native(path, inputs)) <= FP32_TOLERANCE

    check()
