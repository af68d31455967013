"""What every family's parity tests have in common: cases, inputs and the comparison itself.

A family's test module says which cases it has (``Cases``); its tests are those of ``ParityTests``.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from torch.utils import _pytree as pytree

from support.inputs import make_inputs
from support.native import native_model
from support.paths import comfyui_path
from support.tiny_models import tiny, write_tiny

_RELEASE = re.search(r"(\d+)\.(\d+)", (comfyui_path() / "comfyui_version.py").read_text())
assert _RELEASE is not None
# Whether the `rope_options` of the ComfyUI that is tested move reference pictures, too.
REFERENCES_MOVE = {"references_move": tuple(map(int, _RELEASE.groups())) >= (0, 33)}
cached_native_model = functools.lru_cache(maxsize=4)(native_model)


def native(path: Path, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What ComfyUI's own class computes."""
    # ComfyUI writes into the options, and some models into their inputs.
    named = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    with torch.inference_mode():
        model = cached_native_model(path, dtype)
        x, timesteps = named.pop("x"), named.pop("timesteps")
        if "a_timestep" in named:  # BaseModel gives both at once
            timesteps = timesteps, named.pop("a_timestep")
        found: torch.Tensor = model(x, timesteps, **named)
    return found


def assert_equal_to_native(path: Path, remote: Remote, tp_size: int, inputs: Any) -> None:
    found = remote(path, tp_size).evaluate(inputs)
    assert relative_error(found, native(path, inputs)) <= FP32_TOLERANCE


@dataclass(frozen=True)
class Cases:
    """``each``: name → arguments of ``make_inputs``. ``elsewhere``: those for ``other_sizes``, too.

    ``changes``: of the tiny model's sizes.
    """

    family: str
    each: Mapping[str, Mapping[str, Any]]
    elsewhere: Sequence[str]
    other_sizes: Sequence[int] = (1, 4, 5)
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> Any:
        """Of the tiny model."""
        return tiny(self.family, **self.changes)

    def inputs(self, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        return make_inputs(self.sizes, dtype=dtype, **self.each[name])

    @property
    def sized(self) -> list[tuple[int, str]]:
        """(TP size, case)."""
        others = [(size, name) for size in self.other_sizes for name in self.elsewhere]
        return [*((2, name) for name in self.each), *others]


class Fp32Tests:
    """Subclass it with ``cases``; pytest then finds its tests (``pytest_generate_tests``).

    For variants whose blocks another class has in bf16, too.
    """

    cases: ClassVar[Cases]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp(cls.cases.family)
        return write_tiny(cls.cases.family, folder / "tiny.safetensors", **cls.cases.changes)

    @pytest.mark.rotates(7)
    def test_fp32(self, checkpoint: Path, remote: Remote, sized: tuple[int, str]) -> None:
        tp_size, name = sized
        assert_equal_to_native(checkpoint, remote, tp_size, self.cases.inputs(name))


class ParityTests(Fp32Tests):
    """The same, and in bf16."""

    @pytest.mark.rotates(7)
    @pytest.mark.parametrize("tp_size", [2, 4])
    def test_bf16_is_as_close_as_comfyui(
        self, checkpoint: Path, remote: Remote, tp_size: int
    ) -> None:
        """Over all cases: a single one differs by a few percent, since such errors are noise."""
        ours = theirs = 0.0
        for name in self.cases.each:
            comfy, error = self._bf16_reference(checkpoint, name)
            inputs = self.cases.inputs(name, torch.bfloat16)
            found = remote(checkpoint, tp_size, torch.bfloat16).evaluate(inputs)
            assert found.dtype == torch.bfloat16
            ours += relative_error(found, comfy) ** 2
            theirs += error**2
        assert ours <= theirs

    @classmethod
    @functools.cache
    def _bf16_reference(cls, path: Path, name: str) -> tuple[torch.Tensor, float]:
        """ComfyUI's result in bf16, slow on a CPU, and its distance from the one in fp32."""
        inputs = cls.cases.inputs(name, torch.bfloat16)
        comfy = native(path, inputs, torch.bfloat16)
        exact = native(path, pytree.tree_map_only(torch.Tensor, torch.Tensor.float, inputs))
        return comfy, relative_error(comfy, exact)
