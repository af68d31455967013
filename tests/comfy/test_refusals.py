"""What a model on other processes cannot do is refused by name, and nothing is lost by asking."""

from collections.abc import Callable, Iterator

import pytest

from support.comfy_history import PromptError
from support.comfy_server import ComfyServer
from support.workflows import (
    Prompt,
    Sampling,
    node,
    stock_loader,
    text_to_latent,
    tp_loader,
    tp_text_to_latent,
)

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"

Works = Callable[[], list[int]]


@pytest.fixture
def refused(comfy_server: ComfyServer, works: Works) -> Iterator[Callable[..., PromptError]]:
    """`refused(prompt, node_id)`: the error at that node; ranks and server are as before."""

    def check(prompt: Prompt, node_id: str) -> PromptError:
        pids = works()
        with pytest.raises(PromptError) as error:
            comfy_server.run(prompt)
        assert error.value.node_id == node_id
        assert works() == pids
        print(f"{error.value.type.rpartition('.')[2]}: {error.value.message}")
        return error.value

    return check


Refused = Callable[[Prompt, str], PromptError]


def test_a_model_of_the_stock_loader(refused: Refused) -> None:
    prompt = tp_text_to_latent(MODEL) | {"model": stock_loader(MODEL)}
    error = refused(prompt, "sampler")
    assert "Load Diffusion Model (TP)" in error.message
    assert "KSampler" in error.message


@pytest.mark.parametrize("where", ["model", "sampler"])
def test_a_size_that_cannot_work(
    comfy_server: ComfyServer, works: Works, refused: Refused, where: str
) -> None:
    """Said before any process starts."""
    works()
    prompt = tp_text_to_latent(MODEL)
    prompt["model"]["inputs"]["layout"] = "tp"
    prompt[where]["inputs"]["gpu_count"] = "7"
    processes = {process.pid for process in comfy_server.ranks()}
    error = refused(prompt, where)
    assert error.type.endswith("SizeError")
    for part in ("num_heads", "30", "7", "1, 2, 3, 4, 5, 6, 8"):
        assert part in error.message
    assert {process.pid for process in comfy_server.ranks()} == processes


def test_merging_and_saving(refused: Refused) -> None:
    merged = text_to_latent(tp_loader(MODEL, 2), sampling=Sampling(seed=70))
    merged["other"] = stock_loader(MODEL)
    merged["sampler"]["inputs"]["model"] = ["merge", 0]

    merged["merge"] = node("ModelMergeSimple", model1=["other", 0], model2=["model", 0], ratio=0.5)
    assert "read the model's weights" in refused(merged, "merge").message

    merged["merge"] = node("ModelMergeSimple", model1=["model", 0], model2=["other", 0], ratio=0.5)
    assert "merged with another model's" in refused(merged, "sampler").message

    saving = tp_text_to_latent(MODEL)
    saving["saving"] = node("ModelSave", model=["model", 0], filename_prefix="saved")
    assert "ModelSave" in refused(saving, "saving").message


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("model", "gpu_count", "9"),
        ("model", "gpu_count", "two"),
        ("model", "weight_dtype", "int4"),
        ("sampler", "gpu_count", "0"),
        ("sampler", "sampler_name", "euler_typo"),
        ("sampler", "scheduler", "simple_typo"),
    ],
)
def test_a_value_that_is_no_choice(refused: Refused, where: str, name: str, value: str) -> None:
    prompt = tp_text_to_latent(MODEL)
    prompt[where]["inputs"][name] = value
    message = refused(prompt, where).message
    assert name in message
    assert value in message
    assert "not in list" in message
