"""Every stock node that has to do with a MODEL, on ours: the rows of `docs/compatibility.md`.

Of what repeats itself, a share: see `support.rotation`.
"""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.compatibility import (
    FAMILIES,
    NEWER,
    PICTURE,
    FailsInStock,
    Family,
    Refused,
    Row,
    on_latent,
    with_defaults,
)
from support.compatibility_rows import ELSEWHERE, NEWER_SAMPLERS, SAMPLERS, SCHEDULERS
from support.rotation import cases
from support.tiny_vae import write_tiny_flux2_vae, write_tiny_vae, write_tiny_wan_vae
from support.workflows import Prompt, node

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-5
# One evaluation of FLUX.2 is as near as those of the others (tests/parity), but its guided steps
# make more of that: 1.7e-5 was seen; and of Z-Image's 1.03e-5, on a CPU of another maker.
TOLERANCES = {"flux2": 3e-5, "z_image": 2e-5}
BATCH_TOLERANCE = 1e-4

Compare = Callable[..., History]
NodeInfo = dict[str, Any]

# A node that takes or gives one of these has to do with a model.
SOCKETS = {"MODEL", "SAMPLER", "SIGMAS", "GUIDER", "NOISE", "CONTROL_NET", "MODEL_PATCH"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        of_commit = cases(metafunc.config.option.rotate)
        ids = [f"{family.name}-{row.name}" for family, row in of_commit]
        metafunc.parametrize(("family", "row"), of_commit, ids=ids)


@pytest.fixture(scope="module")
def node_info(comfy_server: ComfyServer) -> NodeInfo:
    """ComfyUI's description of its nodes, when every file that the workflows read is there."""
    models = comfy_server.models
    write_tiny_vae(models)
    write_tiny_wan_vae(models)
    write_tiny_flux2_vae(models)
    _write_hypernetwork(models / "hypernetworks" / "tiny.pt")
    for seed, family in enumerate(FAMILIES):
        family.write(models / "diffusion_models" / family.file)
        if family.write_controlnet:
            family.write_controlnet(models / "controlnet" / family.file)
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(1, *family.latent_shape, generator=generator)
        comfy_server.put_latent(family.latent, latent)
    pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(comfy_server.base / "input" / PICTURE)
    info: NodeInfo = comfy_server.get("/object_info")
    return info


@pytest.mark.rotates(5)
def test_workflow(
    comfy_server: ComfyServer,
    node_info: NodeInfo,
    same_as_stock: Compare,
    family: Family,
    row: Row,
) -> None:
    prompt = with_defaults(row.prompt(family), node_info)
    match row.expected(family, NEWER):
        case Refused(where, words, in_stock):
            if in_stock:
                comfy_server.run(row.stock_prompt(prompt))
            error = _error(comfy_server, prompt, where)
            assert not [word for word in words if word not in error.message], error
        case FailsInStock(where):
            _error(comfy_server, row.stock_prompt(prompt), where)
            _error(comfy_server, prompt, where)
        case _:
            tolerance = BATCH_TOLERANCE if row.batched else TOLERANCES.get(family.name, TOLERANCE)
            same_as_stock(prompt, tolerance, row.stock_prompt(prompt))


def test_every_node_of_a_model_is_in_the_table(node_info: NodeInfo) -> None:
    prompts = [row.prompt(family) for family, row in cases(None)]
    named = {item["class_type"] for prompt in prompts for item in prompt.values()}
    concerned = {
        name
        for name, info in node_info.items()
        if info["python_module"].partition(".")[0] in ("nodes", "comfy_extras")
        and not SOCKETS.isdisjoint(_sockets(info))
    }
    assert sorted(concerned - named - set(ELSEWHERE)) == []


def test_every_sampler_and_scheduler_is_in_the_table(node_info: NodeInfo) -> None:
    inputs = node_info["KSampler"]["input"]["required"]
    assert _choices(inputs["sampler_name"]) == {*SAMPLERS, *(NEWER_SAMPLERS if NEWER else ())}
    assert _choices(inputs["scheduler"]) == set(SCHEDULERS)


def _choices(declared: list[Any]) -> set[str]:
    """Of a combo box, as 0.3.75 or as newer releases describe it."""
    kind, *options = declared
    return set(options[0]["options"] if kind == "COMBO" else kind)


@pytest.fixture
def previews_as_before(comfy_server: ComfyServer) -> Iterator[None]:
    """Other tests on the server find the method with which it was started."""
    yield
    method = node("TPTestPreviewMethod", samples=["latent", 0], method="latent2rgb")
    latent = node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    save = node("SaveLatent", samples=["method", 0], filename_prefix="latents/previews")
    comfy_server.run({"latent": latent, "method": method, "save": save})


@pytest.mark.usefixtures("previews_as_before")
@pytest.mark.rotates(6)
@pytest.mark.parametrize("method", ["none", "auto", "latent2rgb", "taesd"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_previews(
    comfy_server: ComfyServer, node_info: NodeInfo, family: Family, method: str
) -> None:
    """Each preview method that ComfyUI has shows the same pictures."""
    row = Row("previews", on_latent("TPTestPreviewMethod", method=method))
    prompt = with_defaults(row.prompt(family), node_info)
    expected = _previews(comfy_server, row.stock_prompt(prompt))
    found = _previews(comfy_server, prompt)
    assert len(found) == len(expected) == (0 if method == "none" else row.sampling.steps)
    for ours, stock in zip(found, expected, strict=True):
        assert ours.shape == stock.shape
        assert (ours.float() - stock.float()).abs().mean() < 1  # of 255, through JPEG


def _previews(server: ComfyServer, prompt: Prompt) -> list[torch.Tensor]:
    server.events.clear()
    server.run(prompt)
    images = [Image.open(BytesIO(event.image)) for event in server.events.all("preview")]
    return [torch.from_numpy(np.array(image)) for image in images]


def _sockets(info: NodeInfo) -> set[str]:
    """The types of a node's inputs and outputs."""
    inputs = [
        kind
        for group in ("required", "optional")
        for kind, *_ in info["input"].get(group, {}).values()
    ]
    return {kind for kind in [*inputs, *info["output"]] if isinstance(kind, str)}


def _write_hypernetwork(path: Path) -> None:
    """For keys and values of width 64, with random weights."""
    path.parent.mkdir(exist_ok=True)
    layers = {"linear.0.weight": torch.rand(64, 64), "linear.0.bias": torch.rand(64)}
    torch.save({64: [layers, layers]}, path)


def _error(server: ComfyServer, prompt: Prompt, where: str) -> PromptError:
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    print(caught.value)
    assert caught.value.node_id == where
    return caught.value
