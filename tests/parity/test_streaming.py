"""A shard that its device may not hold computes the same bits as one that is all there.

On CPU ranks, where the ring is other memory of the host: what is copied when, and what is computed
with, is as on a GPU.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.test_wan import TestVace as Vace
from torch.utils import _pytree as pytree

from support.inputs import make_inputs
from support.quantised_references import inputs_of, write_case
from support.tiny_models import tiny, write_fp8, write_tiny
from tp_runtime.client import (
    GroupConfig,
    ModelSpec,
    RemoteModel,
    Runtime,
    SizeError,
    residency,
)
from tp_runtime.models import families
from tp_runtime.wire.protocol import PatchedWeight, WeightPatch

pytestmark = pytest.mark.process

# Of a shard, what the device may hold; tiny models have few blocks beside the ring.
SHARE, SHARES = 0.6, {"krea2": 0.75}


def equal(found: Any, expected: Any) -> bool:
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def group_of(tp_size: int = 2, **sizes: int) -> GroupConfig:
    return GroupConfig(tp_size, "cpu", (), **sizes)


def spec_of(path: Path, weight_dtype: str = "float32") -> ModelSpec:
    return ModelSpec.of(str(path), weight_dtype, "float32")


def digests(runtime: Runtime, model: RemoteModel) -> list[str]:
    (report,) = (one for one in runtime.reports(digests=True) if one.id == model.group_id)
    return [rank["models"][model.name]["digest"] for rank in report.ranks]


@contextmanager
def limited(runtime: Runtime, whole: RemoteModel, share: float = SHARE) -> Iterator[RemoteModel]:
    """The same model on a group whose devices may hold that share of it, most of it streamed."""
    shard = max(whole.loaded_bytes())
    config = dataclasses.replace(whole.group_config, gpu_memory=int(share * shard))
    model = runtime.model(whole.spec, config)
    model.ensure_loaded()
    (report,) = (one for one in runtime.groups() if one.id == model.group_id)
    streamed = report.models[model.name]["streamed"]
    assert max(model.loaded_bytes()) <= config.gpu_memory
    assert min(streamed) > shard // 2
    yield model
    runtime.release(model.group_id)


def load(
    runtime: Runtime, path: Path, weight_dtype: str = "float32", group: GroupConfig | None = None
) -> RemoteModel:
    model = runtime.model(spec_of(path, weight_dtype), group or group_of())
    model.ensure_loaded()
    return model


@pytest.mark.rotates(8)
@pytest.mark.parametrize("family", sorted(families()))
def test_every_family(runtime: Runtime, tmp_path: Path, family: str) -> None:
    whole = load(runtime, write_tiny(family, tmp_path / "tiny.safetensors"))
    each = [make_inputs(tiny(family), length=length) for length in (20, 33)]
    expected = [whole.evaluate(inputs) for inputs in each]
    with limited(runtime, whole, SHARES.get(family, SHARE)) as model:
        for _ in range(3):
            for inputs, one in zip(each, expected, strict=True):
                assert equal(model.evaluate(inputs), one)


def test_blocks_that_run_several_times(runtime: Runtime, tmp_path: Path) -> None:
    """VACE's, once for each control video; then once, as the order of before is not."""
    cases = Vace.cases
    whole = load(runtime, write_tiny("wan", tmp_path / "tiny.safetensors", **cases.changes))
    two = cases.inputs("two videos")
    one = two | {"vace_context": two["vace_context"][:, :1], "vace_strength": [0.5]}
    with limited(runtime, whole) as model:
        for inputs in (two, one, two, two, one):
            assert equal(model.evaluate(inputs), whole.evaluate(inputs))


def test_skipped_blocks(runtime: Runtime, tmp_path: Path) -> None:
    whole = load(runtime, write_tiny("flux", tmp_path / "tiny.safetensors"))
    plain = make_inputs(tiny("flux"))
    options = {"skip_blocks": {"double_block": [0], "single_block": [1]}}
    without = plain | {"transformer_options": options}
    with limited(runtime, whole) as model:
        for inputs in (plain, without, plain, without):
            assert equal(model.evaluate(inputs), whole.evaluate(inputs))


def test_ranks_that_share_the_tokens(runtime: Runtime, tmp_path: Path) -> None:
    spec = spec_of(write_tiny("z_image", tmp_path / "tiny.safetensors"))
    whole = runtime.model(spec, group_of(1, sequence_size=2))
    whole.ensure_loaded()
    inputs = make_inputs(tiny("z_image"), batch=2)
    expected = whole.evaluate(inputs)
    with limited(runtime, whole) as model:
        for _ in range(2):
            assert equal(model.evaluate(inputs), expected)


def on_host(runtime: Runtime, model: RemoteModel) -> list[int]:
    """Bytes that are taken of the memory of each part, which the ranks share without a name."""
    (report,) = (one for one in runtime.reports() if one.id == model.group_id)
    taken = {}
    for rank in report.ranks:
        for file in Path(f"/proc/{rank['pid']}/fd").iterdir():
            if "tp-runtime-part" in str(file.readlink()):
                taken[file.stat().st_ino] = 512 * file.stat().st_blocks
    return list(taken.values())


@pytest.mark.rotates(3)
@pytest.mark.parametrize(("tp_size", "copies"), [(2, "batch_groups"), (1, "sequence_size")])
def test_ranks_with_the_same_part_have_one_copy_in_the_hosts_memory(
    runtime: Runtime, tmp_path: Path, tp_size: int, copies: str
) -> None:
    path = write_tiny("flux", tmp_path / "tiny.safetensors")
    whole = load(runtime, path, group=group_of(tp_size, **{copies: 2}))
    assert on_host(runtime, whole) == [0] * tp_size
    with limited(runtime, whole) as model:
        (report,) = (one for one in runtime.groups() if one.id == model.group_id)
        streamed = report.models[model.name]["streamed"]
        assert len(streamed) == 2 * tp_size
        before = on_host(runtime, model)
        assert [-(-size // 4096) * 4096 for size in streamed[:tp_size]] == before
        model.patch(0.5, patches(model, 0.5))
        model.ensure_loaded()
        inputs = make_inputs(tiny("flux"))
        model.evaluate(inputs)
        assert min(on_host(runtime, model)) > max(before)
        model.patch(None, {})
        model.evaluate(inputs)
        assert on_host(runtime, model) == before
        assert model._group._residency is not None
        model._group._residency._unload(model.name, None)
        assert on_host(runtime, model) == [0] * tp_size


def test_sleep_and_wake(runtime: Runtime, tmp_path: Path) -> None:
    whole = load(runtime, write_tiny("qwen_image", tmp_path / "tiny.safetensors"))
    inputs = make_inputs(tiny("qwen_image"))
    expected = whole.evaluate(inputs)
    with limited(runtime, whole) as model:
        assert digests(runtime, model) == digests(runtime, whole)
        assert equal(model.evaluate(inputs), expected)
        model.sleep()
        assert model.loaded_bytes() == [0, 0]
        assert digests(runtime, model) == digests(runtime, whole)
        model.ensure_loaded()
        for _ in range(2):
            assert equal(model.evaluate(inputs), expected)
        assert digests(runtime, model) == digests(runtime, whole)


def patches(model: RemoteModel, strength: float) -> dict[str, PatchedWeight]:
    """A LoRA of rank 4 on every weight of its blocks that has two axes."""
    found = {}
    for seed, (name, info) in enumerate(sorted(model.info.tensors.items())):
        if len(info.shape) == 2 and name.endswith(".weight") and ".0." in name:
            generator = torch.Generator().manual_seed(seed)
            up = torch.randn(info.shape[0], 4, generator=generator)
            down = torch.randn(4, info.shape[1], generator=generator) / info.shape[1] ** 0.5
            lora = WeightPatch("lora", (up, down, None, None, None, None), strength)
            found[name] = PatchedWeight(seed, ((lora,),))
    assert len(found) > 5
    return found


def assert_patched_alike(runtime: Runtime, whole: RemoteModel, inputs: Any) -> None:
    """With a LoRA, with another strength of it, and without."""
    plain = whole.evaluate(inputs)
    with limited(runtime, whole) as model:
        before = digests(runtime, model)
        for strength in (0.8, -0.3):
            for one in (whole, model):
                one.patch(strength, patches(one, strength))
            expected = whole.evaluate(inputs)
            assert not equal(expected, plain)
            for _ in range(2):
                assert equal(model.evaluate(inputs), expected)
            assert digests(runtime, model) == digests(runtime, whole) != before
        model.sleep()
        assert equal(model.evaluate(inputs), expected)
        for one in (whole, model):
            one.patch(None, {})
        assert equal(model.evaluate(inputs), plain)
        assert equal(whole.evaluate(inputs), plain)
        assert digests(runtime, model) == before


@pytest.mark.rotates(5)
@pytest.mark.parametrize(
    ("family", "group"),
    [("flux", group_of()), ("wan", group_of()), ("flux", group_of(1, sequence_size=2))],
)
def test_lora(runtime: Runtime, tmp_path: Path, family: str, group: GroupConfig) -> None:
    whole = load(runtime, write_tiny(family, tmp_path / "tiny.safetensors"), group=group)
    assert_patched_alike(runtime, whole, make_inputs(tiny(family)))


@pytest.mark.rotates(5)
@pytest.mark.parametrize(
    ("family", "name"), [("qwen_image", "int8_convrot"), ("flux", "w4a8"), ("flux", "fp8")]
)
def test_quantised(runtime: Runtime, tmp_path: Path, family: str, name: str) -> None:
    """The bytes of the file, scales and codebooks among them, are what is streamed."""
    whole = load(runtime, write_case(family, name, tmp_path))
    inputs = inputs_of(family)
    expected = whole.evaluate(inputs)
    with limited(runtime, whole) as model:
        assert digests(runtime, model) == digests(runtime, whole)
        for _ in range(2):
            assert equal(model.evaluate(inputs), expected)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("group", [group_of(), group_of(1, batch_groups=2)])
def test_lora_on_quantised(runtime: Runtime, tmp_path: Path, group: GroupConfig) -> None:
    whole = load(runtime, write_case("qwen_image", "int8_convrot", tmp_path), group=group)
    assert_patched_alike(runtime, whole, inputs_of("qwen_image"))


def test_fp8(runtime: Runtime, tmp_path: Path) -> None:
    plain = write_tiny("z_image", tmp_path / "plain.safetensors")
    path = write_fp8(plain, tmp_path / "fp8.safetensors", "plain")
    whole = load(runtime, path, "float8_e4m3fn")
    inputs = make_inputs(tiny("z_image"))
    with limited(runtime, whole) as model:
        for _ in range(2):
            assert equal(model.evaluate(inputs), whole.evaluate(inputs))


def test_one_that_cannot_fit_is_refused(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all ranks alike, which go on; or before they are asked, if the host has no room."""
    big = write_tiny("z_image", tmp_path / "big.safetensors")
    config = dataclasses.replace(group_of(), gpu_memory=2**20)
    model = runtime.model(spec_of(big), config)
    with pytest.raises(SizeError, match=r"Z-Image needs at least .* raise TP_RUNTIME_GPU_MEMORY"):
        model.ensure_loaded()
    small = write_tiny("wan", tmp_path / "small.safetensors")
    (before,) = (one for one in runtime.reports() if one.id == model.group_id)
    assert before.models == {}
    with pytest.raises(SizeError, match="Wan needs at least"):
        runtime.model(spec_of(small), config).ensure_loaded()
    (after,) = (one for one in runtime.reports() if one.id == model.group_id)
    assert [rank["pid"] for rank in after.ranks] == [rank["pid"] for rank in before.ranks]

    monkeypatch.setattr(residency.Residency, "_host_has_room", lambda *_: False)
    with pytest.raises(
        SizeError, match=r"for each of 2 parts must stay in the host's memory.*RESERVE"
    ):
        model.ensure_loaded()
    runtime.release(model.group_id)
