"""Steps on one GPU, fast and as written, in every way that a model can be changed meanwhile."""

from pathlib import Path

import pytest
import torch
from gpu.conftest import (
    DEVICE_TOLERANCE,
    FAMILIES,
    FP32_TOLERANCE,
    Load,
    evaluate,
    in_dtype,
    make_inputs,
    on_gpu,
    relative_error,
    steps,
)

from support.quantised_files import write_quantised
from support.tiny_models import Fp8Layout, write_fp8, write_tiny
from tp_runtime.client import RemoteModel, Runtime
from tp_runtime.gpu.graphs import MAX_GRAPHS
from tp_runtime.wire.protocol import PatchedWeight, WeightPatch

pytestmark = pytest.mark.gpu

# Family → a weight of a fused, a row-parallel and a column-parallel layer.
PATCHED = {
    "z_image": ("attention.qkv", "feed_forward.w2", "feed_forward.w1"),
    "flux": ("img_attn.qkv", "txt_mlp.2", "img_mlp.0"),
    "flux2": ("img_attn.qkv", "linear1", "img_mlp.0"),
    "qwen_image": ("attn.to_k", "img_mlp.net.2", "txt_mlp.net.0.proj"),
    "qwen_image_21": ("attn.to_k", "img_mlp.out", "img_mlp.gate_up"),
    "krea2": ("attn.wk", "mlp.down", "mlp.up"),
    "wan": ("self_attn.q", "ffn.2", "ffn.0"),
    "ltx2": ("attn1.to_k", "ff.net.2", "ff.net.0.proj"),
    "minimax_h3": ("attn.qkv_proj", "mlp.fc2", "mlp.fc1"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny(name, folder / f"{name}.safetensors") for name in FAMILIES}


def on_rank(runtime: Runtime, model: RemoteModel, *, digests: bool = False) -> dict:
    """What the GPU's rank says: of itself, and of the model under "model"."""
    (rank,) = (
        rank
        for group in runtime.reports(digests=digests)
        if group.device == "cuda"
        for rank in group.ranks
    )
    return rank | {"model": rank["models"][model.name]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_fp32(load: Load, files: dict[str, Path], family: str, batch: int) -> None:
    inputs = make_inputs(family, batch=batch)
    expected, *_ = written = steps(load(files[family], optimize="off"), inputs)
    on_cpu = evaluate(load(files[family], device="cpu"), inputs)
    assert relative_error(expected, on_cpu) <= DEVICE_TOLERANCE
    for found in written + steps(load(files[family]), inputs):
        assert relative_error(found, expected) <= FP32_TOLERANCE


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_are_as_exact_as_written(
    load: Load, files: dict[str, Path], family: str, dtype: str, bits: int
) -> None:
    """As written is ComfyUI's arithmetic, operation by operation; fused, no more is lost."""
    inputs = in_dtype(make_inputs(family), getattr(torch, dtype))
    on_cpu = load(files[family], device="cpu")
    expected = evaluate(on_cpu, in_dtype(inputs, torch.float32))
    written, *_ = steps(load(files[family], dtype, "off"), inputs)
    allowed = relative_error(written, expected)
    assert 0.02 < allowed * 2**bits < 8
    for found in steps(load(files[family], dtype), inputs):
        assert relative_error(found, expected) <= 1.05 * allowed


def test_inputs_on_the_gpu(load: Load, files: dict[str, Path]) -> None:
    """Where ComfyUI has them; conditioning is a new tensor at every step."""
    inputs = make_inputs("flux")
    model = load(files["flux"])
    expected = steps(model, inputs)[-1]
    for seed in range(3):
        there = on_gpu(inputs)
        assert torch.equal(model.evaluate(there).cpu(), expected)
        changed = there | {"context": there["context"] + seed + 1}
        assert not torch.equal(model.evaluate(changed).cpu(), expected)


def test_more_shapes_than_are_kept(runtime: Runtime, load: Load, files: dict[str, Path]) -> None:
    """Each is right again after its graph was dropped, and memory does not grow with them."""
    model, written = load(files["z_image"]), load(files["z_image"], optimize="off")
    sizes = [2 * (index + 3) for index in range(MAX_GRAPHS + 2)]
    allocated = []
    for _ in range(3):
        for height in sizes:
            inputs = make_inputs("z_image", height)
            expected = written.evaluate(inputs)
            for found in steps(model, inputs):
                assert relative_error(found, expected) <= FP32_TOLERANCE
        allocated.append(on_rank(runtime, model)["memory"]["allocated_bytes"])
    assert allocated[2] <= 1.01 * allocated[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_sleep_and_wake(runtime: Runtime, load: Load, files: dict[str, Path], family: str) -> None:
    model, inputs = load(files[family]), make_inputs(family)
    expected = steps(model, inputs)[-1]
    awake = on_rank(runtime, model, digests=True)
    model.sleep()
    asleep = on_rank(runtime, model, digests=True)
    assert asleep["model"]["asleep"]
    assert asleep["model"]["digest"] == awake["model"]["digest"]
    freed = awake["memory"]["allocated_bytes"] - asleep["memory"]["allocated_bytes"]
    assert freed >= awake["model"]["resident_bytes"]
    model.ensure_loaded()
    for found in steps(model, inputs):
        assert relative_error(found, expected) <= FP32_TOLERANCE
    assert on_rank(runtime, model, digests=True)["model"]["digest"] == awake["model"]["digest"]


def patches_of(model: RemoteModel, strength: float) -> dict[str, PatchedWeight]:
    """A LoRA of rank 4 on a few weights, by their names in the file."""
    found = {}
    for name, info in model.info.tensors.items():
        if name.endswith(tuple(f"{path}.weight" for path in PATCHED[model.info.family.name])):
            rows, columns = info.shape
            generator = torch.Generator().manual_seed(rows)
            up = torch.randn(rows, 4, generator=generator)
            down = torch.randn(4, columns, generator=generator) / columns**0.5
            lora = WeightPatch("lora", (up, down, None, None, None, None), strength)
            found[name] = PatchedWeight(0, ((lora,),))
    assert len(found) >= len(PATCHED[model.info.family.name])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(runtime: Runtime, load: Load, files: dict[str, Path], family: str) -> None:
    """Applied, changed and removed between replays of one recorded step."""
    inputs = make_inputs(family)
    written, model = load(files[family], optimize="off"), load(files[family])
    plain = steps(model, inputs)[-1]
    before = on_rank(runtime, model, digests=True)["model"]["digest"]
    for strength in (0.8, -0.3):
        for one in (written, model):
            one.patch(strength, patches_of(one, strength))
            one.ensure_loaded()
        expected, found = evaluate(written, inputs), evaluate(model, inputs)
        assert relative_error(expected, plain) > 0.01
        assert relative_error(found, expected) <= FP32_TOLERANCE
    for one in (written, model):
        one.patch(None, {})
        one.ensure_loaded()
    assert torch.equal(evaluate(model, inputs), plain)
    assert on_rank(runtime, model, digests=True)["model"]["digest"] == before


def test_a_lora_that_widens_the_input(load: Load, files: dict[str, Path]) -> None:
    """In turns with none: the recorded steps of each read its own weight."""
    narrow = make_inputs("flux")
    wide = narrow | {"x": torch.cat((narrow["x"], narrow["x"].flip(1)), dim=1)}
    written, model = load(files["flux"], optimize="off"), load(files["flux"])
    plain, name = steps(model, narrow)[-1], "img_in.weight"
    rows, columns = model.info.tensors[name].shape
    shape, generator = (rows, 2 * columns), torch.Generator().manual_seed(rows)
    up, down = (torch.randn(*one, generator=generator) for one in ((rows, 4), (4, shape[1])))
    for strength in (0.8, -0.3, 0.8):
        lora = WeightPatch("lora", (up, down / 8, None, None, None, list(shape)), strength)
        for one in (written, model):
            one.patch(strength, {name: PatchedWeight(0, ((lora,),), shape=shape)})
            one.ensure_loaded()
        expected = written.evaluate(wide)
        for found in steps(model, wide):
            assert relative_error(found, expected) <= FP32_TOLERANCE
        if strength < 0:  # what is recorded goes, and with it the place of the other shape
            model.sleep()
            model.ensure_loaded()
        for one in (written, model):
            one.patch(None, {})
            one.ensure_loaded()
        for found in steps(model, narrow):
            assert relative_error(found, plain) <= FP32_TOLERANCE


@pytest.mark.parametrize("layout", ["plain", "scaled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8(
    load: Load, files: dict[str, Path], tmp_path: Path, family: str, layout: Fp8Layout
) -> None:
    path = write_fp8(files[family], tmp_path / "fp8.safetensors", layout)
    weight_dtype = "float8_e4m3fn" if layout == "plain" else "float32"
    inputs = make_inputs(family)
    expected = evaluate(load(path, optimize="off", weight_dtype=weight_dtype), inputs)
    on_cpu = evaluate(load(path, device="cpu", weight_dtype=weight_dtype), inputs)
    assert relative_error(expected, on_cpu) <= DEVICE_TOLERANCE
    for found in steps(load(path, weight_dtype=weight_dtype), inputs):
        assert relative_error(found, expected) <= FP32_TOLERANCE


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_awq", "mxfp8"])
def test_quantised_in_blocks(load: Load, files: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Dequantised at every use, also in a recorded step."""
    path = write_quantised(files["qwen_image"], tmp_path / "q.safetensors", name)
    inputs = make_inputs("qwen_image")
    expected = evaluate(load(path, optimize="off"), inputs)
    assert relative_error(expected, evaluate(load(path, device="cpu"), inputs)) <= DEVICE_TOLERANCE
    for found in steps(load(path), inputs):
        assert relative_error(found, expected) <= FP32_TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
def test_timesteps_of_frames(load: Load, files: dict[str, Path], batch: int) -> None:
    """Each token has its frame's row of the modulation, in the kernel that sums and norms, too."""
    inputs = make_inputs("wan", batch=batch)
    times = torch.tensor([[0.0, 500.0, 250.0], [125.0, 0.0, 1000.0]])
    inputs |= {"timesteps": times[:batch]}
    expected = evaluate(load(files["wan"], optimize="off"), inputs)
    on_cpu = evaluate(load(files["wan"], device="cpu"), inputs)
    assert relative_error(expected, on_cpu) <= DEVICE_TOLERANCE
    for found in steps(load(files["wan"]), inputs):
        assert relative_error(found, expected) <= FP32_TOLERANCE


class _Cancelled(BaseException):
    pass


def test_cancel(load: Load, files: dict[str, Path]) -> None:
    """At every stage of a shape's first steps; what comes next is right."""

    def cancel() -> None:
        raise _Cancelled

    model, written = load(files["flux"]), load(files["flux"], optimize="off")
    for height in (20, 22):
        inputs, others = make_inputs("flux", height), make_inputs("flux", height + 8)
        for _ in range(3):
            try:
                model.evaluate(inputs, poll=cancel)
            except _Cancelled:
                found = model.evaluate(others)
                assert relative_error(found, written.evaluate(others)) <= FP32_TOLERANCE
        found = model.evaluate(inputs)
        assert relative_error(found, written.evaluate(inputs)) <= FP32_TOLERANCE
