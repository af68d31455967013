"""Inputs that do not fit are refused before anything is sent, and results that are no numbers.

The group, and all that it has loaded, stays. The cases are made of what each family declares.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from process.conftest import cpu_group
from safetensors.torch import load_file, save_file

from support.inputs import make_inputs
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import (
    MODEL_PATCHES,
    InputError,
    ModelSpec,
    RemoteModel,
    Runtime,
    TPRuntimeError,
)
from tp_runtime.models import families
from tp_runtime.models.family import AtLeast, Input

pytestmark = pytest.mark.process


def loaded(runtime: Runtime, path: Path, dtype: str = "float32") -> RemoteModel:
    model = runtime.model(ModelSpec.of(str(path), dtype, dtype), cpu_group())
    model.ensure_loaded()
    return model


def good(family: str) -> dict[str, Any]:
    """Of every declared input one that fits, references included."""
    lengths = {"samples": 4}
    return make_inputs(
        tiny(family), height=8, width=8, length=80, references=[(8, 8)], lengths=lengths
    )


def wrong(declared: Input, right: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """Every way in which one input can be unlike its declaration."""
    yield "no tensor", "text"
    yield "a number", 1.5
    yield "without axes", torch.tensor(1.5)
    yield "two axes more", right[None, None]
    if not declared.or_axes:
        yield "an axis more", right[None]
    yield "complex", right.to(torch.complex64)
    yield "integers", right.to(torch.int64)
    yield "on no device", right.to("meta")
    yield "sparse", right.to_sparse()
    if declared.kind != "number":
        yield "bf16", right.bfloat16()
        yield "fp64", right.double()
    for index, axis in enumerate(declared.axes):
        yield f"no {axis}", right.narrow(index, 0, 0)
        if isinstance(axis, AtLeast):
            yield f"less {axis}", right.narrow(index, 0, axis.length - 1)
        elif not isinstance(axis, str) or axis == "batch":
            yield f"more {axis}", torch.cat((right, right), dim=index)


def evaluations(runtime: Runtime) -> list[int]:
    """How many each rank has made."""
    return [rank["evaluations"] for report in runtime.reports() for rank in report.ranks]


@pytest.mark.parametrize("family", families())
def test_every_input_is_checked_before_anything_is_sent(
    runtime: Runtime, tmp_path: Path, family: str
) -> None:
    model = loaded(runtime, write_tiny(family, tmp_path / "tiny.safetensors"))
    inputs, declared = good(family), tiny(family).all_inputs
    expected = model.evaluate(inputs)
    sent = evaluations(runtime)
    kinds = 0
    for name, one in declared.items():
        if name not in inputs:
            continue  # masks, which the forward checks
        listed = one.many or one.besides
        rights = inputs[name] if listed else [inputs[name]]
        for place, each in enumerate((one, *one.besides)):
            for what, value in wrong(each, rights[place]):
                if name == "x" and place == 0 and what == "more batch":
                    continue  # is right: it is the others that are too few
                kinds += 1
                given = [*rights[:place], value, *rights[place + 1 :]]
                with pytest.raises(InputError) as error:
                    model.evaluate(inputs | {name: given if listed else value})
                words = {each.what, each.what.lower(), one.what}
                assert any(word in str(error.value) for word in words), what
                assert re.search(r"\. [A-Z].*\.$", str(error.value)), "it says what to do"
        if one.besides:
            too_few = [] if one.besides[-1].optional else [rights[0], rights[:1]]
            for given in (*too_few, [*rights, rights[0]], {"0": rights[0]}):
                with pytest.raises(InputError, match=f"must be a list of {len(rights)} tensors"):
                    model.evaluate(inputs | {name: given})
        if one.many:
            with pytest.raises(InputError, match="must be a list of tensors"):
                model.evaluate(inputs | {name: {"0": inputs[name][0]}})
        if not one.optional:
            with pytest.raises(InputError, match=f"needs the model input {name}"):
                model.evaluate(inputs | {name: None})
    assert kinds > 30
    assert evaluations(runtime) == sent, "nothing was sent"
    assert same(model.evaluate(inputs), expected)


def same(
    found: torch.Tensor | list[torch.Tensor], expected: torch.Tensor | list[torch.Tensor]
) -> bool:
    if isinstance(found, torch.Tensor):
        return torch.equal(found, expected)
    return all(map(torch.equal, found, expected))


# Sizes of models of a family that are given more than its small one.
VARIANTS = {
    "wan": (
        {"image_dim": 32, "reference_channels": 16},
        {"vace_blocks": 1, "vace_channels": 96},
        {"camera_channels": 6},
        {"pose_channels": 16, "mask_channels": 28},
        {"has_faces": True},
        {"image_dim": 32, "poses_pass": True},
    )
}


@pytest.mark.parametrize("family", families())
def test_the_declaration_is_the_forwards_signature(family: str) -> None:
    """What is declared is what the family's forward takes: neither more nor less."""
    forward, sizes = families()[family].forward(), tiny(family)
    taken = set(inspect.signature(forward.condition).parameters)
    taken |= {"timesteps", "transformer_options"}
    as_given = {"control", "a_timestep", MODEL_PATCHES}  # which `condition` does not see
    taken |= as_given & set(inspect.signature(forward.evaluate).parameters)
    variants = [sizes, *(replace(sizes, **changes) for changes in VARIANTS.get(family, ()))]
    declared = {name for one in variants for name in one.all_inputs}
    declared |= {*sizes.plain_inputs, "transformer_options"}
    assert taken - {"self"} == declared


WRONG_MASKS = {
    "complex": torch.ones(80, 80, dtype=torch.complex64),
    "integers": torch.ones(80, 80, dtype=torch.int64),
    "bf16": torch.ones(80, 80, dtype=torch.bfloat16),
    "of another batch": torch.ones(3, 80, 80),
    "of other tokens": torch.ones(81, 81),
    "no axes": torch.tensor(1.0),
}


def test_what_the_forward_checks_leaves_the_group(runtime: Runtime, tmp_path: Path) -> None:
    """Masks and residuals, whose shapes follow from the others'."""
    model = loaded(runtime, write_tiny("flux", tmp_path / "tiny.safetensors"))
    inputs = good("flux") | {"ref_latents": None}
    inputs["context"] = inputs["context"][:, :64]
    tokens = 64 + 16
    expected = model.evaluate(inputs | {"attention_mask": torch.ones(tokens, tokens).bool()})
    before = [rank["pid"] for rank in runtime.reports()[0].ranks]
    for mask in WRONG_MASKS.values():
        with pytest.raises(InputError, match=r"[Aa]ttention mask"):
            model.evaluate(inputs | {"attention_mask": mask})
    residual = torch.zeros(1, 4, tiny("flux").dim)
    for strange in (residual[0], residual.to(torch.complex64), residual.expand(3, -1, -1)):
        with pytest.raises(TPRuntimeError, match=r"ControlNet|complex64"):
            model.evaluate(inputs | {"control": {"input": [strange]}})
    assert [rank["pid"] for rank in runtime.reports()[0].ranks] == before
    assert torch.equal(model.evaluate(inputs), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_result_that_is_not_finite_is_an_error(
    runtime: Runtime, tmp_path: Path, groups: int
) -> None:
    """In fp16 the model overflows; the error says where and what to do, and the group stays."""
    path = write_tiny("z_image", tmp_path / "tiny.safetensors")
    tensors = load_file(path)
    name = "layers.0.feed_forward.w2.weight"
    tensors[name] = (tensors[name] * 3e4).clamp(-6e4, 6e4)
    save_file(tensors, tmp_path / "loud.safetensors")
    config = cpu_group(2 // groups, batch_groups=groups)
    models = [
        runtime.model(ModelSpec.of(str(tmp_path / "loud.safetensors"), dtype, dtype), config)
        for dtype in ("float16", "float32")
    ]
    inputs = good("z_image")
    inputs = {name: torch.cat([value] * groups) for name, value in inputs.items() if len(value)}
    half = {name: value.half() for name, value in inputs.items()}

    def pids() -> list[int]:
        """Of the ranks of this layout; groups of other tests may end meanwhile."""
        reports = [one for one in runtime.reports() if one.batch_groups == groups]
        return [rank["pid"] for report in reports for rank in report.ranks]

    models[0].ensure_loaded()
    before = pids()
    assert before
    message = r"of the \d+ values of .* NaN .* timestep 0\.\d+.* float16.*Set weight_dtype"
    with pytest.raises(TPRuntimeError, match=message) as error:
        models[0].evaluate(half | {"timesteps": inputs["timesteps"]})
    assert type(error.value).__name__ == "NotFiniteError"
    models[1].ensure_loaded()
    assert models[1].evaluate(inputs).isfinite().all()
    broken = inputs | {"context": inputs["context"] * torch.nan}
    with pytest.raises(TPRuntimeError, match="or its conditioning or weights are no numbers"):
        models[1].evaluate(broken)
    assert models[1].evaluate(inputs).isfinite().all()
    assert pids() == before
