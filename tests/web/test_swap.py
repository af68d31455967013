"""One action puts our loader in the place of the stock one ("Use several GPUs"), and back."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.comfy_page import PICTURES, ComfyPage
from support.workflows import Prompt, Sampling, node, stock_loader, text_to_latent, tp_loader

pytestmark = pytest.mark.web
every_page = pytest.mark.every_page

MODEL = "tiny_z_image.safetensors"
OURS, STOCK = "TPLoadDiffusionModel", "UNETLoader"
SWAP, BACK = "Use several GPUs (TP)", "Use ComfyUI's own loader"

PREPARE = """() => {
    const loader = app.graph.nodes.find(({ comfyClass }) => comfyClass === 'UNETLoader');
    Object.assign(loader, { color: '#322', bgcolor: '#533', title: 'My loader' });
    loader.properties.models = [{ name: 'file', url: 'https://example.org/file' }];
    const file = loader.widgets.find(({ name }) => name === 'unet_name');
    file.value = 'z_image_turbo_bf16.safetensors';
    const { subgraph } = app.graph.convertToSubgraph(new Set([loader])).node;
    const inner = subgraph.nodes[0];
    const slot = inner.inputs.find(({ name }) => name === 'unet_name');
    subgraph.addInput('unet_name', 'COMBO').connect(slot, inner);
}"""
# What a workflow has of a loader, wherever it is.
LOADERS = """() => {
    const found = [];
    const look = (graph) => graph.nodes.forEach((node) => {
        if (['UNETLoader', 'TPLoadDiffusionModel'].includes(node.comfyClass)) found.push({
            title: node.title === node.constructor.title ? null : node.title,
            type: node.comfyClass, id: node.id, pos: [...node.pos], mode: node.mode,
            color: node.color, models: node.properties.models,
            file: node.widgets.find(({ name }) => name === 'unet_name').value,
        });
        if (node.subgraph) look(node.subgraph);
    });
    look(app.rootGraph ?? app.graph);
    return found;
}"""


def loaders(web: ComfyPage) -> list[dict[str, Any]]:
    return list(web.page.evaluate(LOADERS))


def wait_for(web: ComfyPage, node_type: str) -> None:
    web.page.wait_for_function(
        f"(type) => ({LOADERS})().every((loader) => loader.type === type)", arg=node_type
    )


def stock_prompt() -> Prompt:
    return text_to_latent(stock_loader(MODEL), sampling=Sampling(steps=1))


def right_click(web: ComfyPage, node_type: str) -> None:
    """Open the menu of a node, drawn on the canvas or in HTML."""
    web.await_drawing()
    x, y = web.page.evaluate(
        """(type) => {
            const { pos, size } = app.graph.nodes.find(({ comfyClass }) => comfyClass === type);
            return app.canvasPosToClientPos([pos[0] + size[0] / 2, pos[1] - 12]);
        }""",
        node_type,
    )
    web.page.mouse.click(x, y, button="right")


@every_page
def test_the_menu_of_a_node(web: ComfyPage) -> None:
    web.load_prompt(stock_prompt())
    before = web.prompt()
    web.fit_view()
    right_click(web, STOCK)
    entry = web.page.get_by_text(SWAP, exact=True).last
    entry.wait_for()
    web.page.screenshot(path=PICTURES / f"swap_menu_{'html' if web.html else 'canvas'}.png")
    entry.click()
    wait_for(web, OURS)
    (loader,) = [item for item in web.prompt().values() if item["class_type"] == OURS]
    assert loader["inputs"]["unet_name"] == MODEL
    assert loader["inputs"]["gpu_count"] == "auto"
    web.page.wait_for_timeout(800)
    right_click(web, OURS)
    web.page.get_by_text(BACK, exact=True).last.click()
    wait_for(web, STOCK)
    assert web.prompt() == before


@every_page
def test_the_whole_workflow(web: ComfyPage) -> None:
    """With what a subgraph shows of a loader."""
    web.load_prompt(stock_prompt() | {"other": stock_loader(MODEL)})
    web.page.evaluate(PREPARE)
    before, sent = loaders(web), web.prompt()
    web.run_command("TensorParallel.UseInWorkflow")
    wait_for(web, OURS)
    after = loaders(web)
    assert [loader | {"type": STOCK} for loader in after] == before
    ours = [item for item in web.prompt().values() if item["class_type"] == OURS]
    assert [item["inputs"]["unet_name"] for item in ours] == [
        item["inputs"]["unet_name"] for item in sent.values() if item["class_type"] == STOCK
    ]
    web.run_command("TensorParallel.UseStockInWorkflow")
    wait_for(web, STOCK)
    assert loaders(web) == before
    assert web.prompt() == sent


# Load Diffusion Model and what is below it as in ComfyUI's templates, in a group and above one.
AS_IN_TEMPLATES = """() => {
    const places = { UNETLoader: [0, 0], EmptySD3LatentImage: [0, 130], KSampler: [400, 0] };
    for (const node of app.graph.nodes)
        node.pos = places[node.comfyClass] ?? [400 * app.graph.nodes.indexOf(node), 330];
    for (const [y, height] of [[-80, 360], [290, 300]]) {
        const group = new LGraphGroup('group');
        group.pos = [-20, y];
        group.size = [300, height];
        app.graph.add(group);
    }
}"""
BOXES = """() => app.graph.nodes.map(({ comfyClass, pos, size }) =>
    [comfyClass, pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]])"""


@every_page
def test_the_new_loader_covers_nothing(web: ComfyPage) -> None:
    """It is higher than the stock one, so what is below moves down, and groups go with it."""
    web.load_prompt(stock_prompt())
    web.page.evaluate(AS_IN_TEMPLATES)
    web.run_command("TensorParallel.UseInWorkflow")
    wait_for(web, OURS)
    web.page.wait_for_timeout(1000)  # HTML nodes are measured
    web.fit_view()
    web.page.screenshot(path=PICTURES / f"swap_makes_room_{web.name}.png")
    boxes = {name: box for name, *box in web.page.evaluate(BOXES)}
    assert boxes[OURS][1] == -30
    for name, box in boxes.items():
        apart = box[0] >= boxes[OURS][2] or box[1] >= boxes[OURS][3]
        assert name == OURS or apart, name
    first, second = web.page.evaluate(
        "() => app.graph.groups.map(({ pos, size }) => [...pos, ...size])"
    )
    assert first[1] + first[3] > boxes["EmptySD3LatentImage"][3]
    assert second[1] > boxes["EmptySD3LatentImage"][3]


@every_page
def test_undone_and_done_again_in_one_step(web: ComfyPage) -> None:
    web.load_prompt(stock_prompt())
    before = web.prompt()
    web.run_command("TensorParallel.UseInWorkflow")
    wait_for(web, OURS)
    assert web.page.evaluate("app.extensionManager.workflow.activeWorkflow.isModified")
    after = web.prompt()
    web.await_drawing()
    web.page.wait_for_timeout(1000)
    web.page.mouse.click(900, 700)  # the page looks for changes then
    web.page.keyboard.press("Control+z")
    wait_for(web, STOCK)
    assert web.prompt() == before
    web.await_drawing()
    web.page.wait_for_timeout(1000)  # what is not drawn yet has other sizes: a change of its own
    web.page.keyboard.press("Control+y")
    wait_for(web, OURS)
    assert web.prompt() == after


@every_page
def test_a_model_of_another_family_stays_with_its_own_loader(web: ComfyPage) -> None:
    """Templates have depth and segmentation models beside the one that is sampled."""
    other = web.server.models / "diffusion_models" / "another_model.safetensors"
    save_file({"conv_in.weight": torch.zeros(4, 4)}, other)
    web.load_prompt(stock_prompt() | {"other": stock_loader(other.name)})
    web.run_command("TensorParallel.UseInWorkflow")
    web.page.get_by_text("another_model.safetensors").last.wait_for()
    found = {loader["file"]: loader["type"] for loader in loaders(web)}
    assert found == {MODEL: OURS, other.name: STOCK}


@every_page
def test_tp_samplers_go_with_their_loader(web: ComfyPage) -> None:
    web.load_prompt(text_to_latent(tp_loader(MODEL, 2), "TPSampler", Sampling(seed=9)))
    web.run_command("TensorParallel.UseStockInWorkflow")
    wait_for(web, STOCK)
    sent = {item["class_type"]: item["inputs"] for item in web.prompt().values()}
    assert sent["KSampler"]["seed"] == 9
    assert "TPSampler" not in sent


@every_page
def test_a_value_that_ours_cannot_have_is_said(web: ComfyPage) -> None:
    prompt = stock_prompt()
    prompt["model"] = node(STOCK, unet_name=MODEL, weight_dtype="fp8_e5m2")
    web.load_prompt(prompt)
    web.run_command("TensorParallel.UseInWorkflow")
    wait_for(web, OURS)
    offered = web.widget(OURS, "weight_dtype", "options.values")
    if "fp8_e5m2" in offered:
        assert web.widget(OURS, "weight_dtype") == "fp8_e5m2"
    else:
        web.page.get_by_text("weight_dtype: fp8_e5m2 → default").last.wait_for()


# --- workflows of before the file was called `unet_name` ------------------------------------------


@every_page
def test_an_old_prompt_opens_and_runs(web: ComfyPage) -> None:
    prompt = text_to_latent(tp_loader(MODEL, 1), sampling=Sampling(seed=10, steps=1))
    inputs = prompt["model"]["inputs"]
    inputs["model_name"] = inputs.pop("unet_name")
    web.load_prompt(prompt)
    assert web.widget(OURS, "unet_name") == MODEL
    web.server.run(prompt)


@every_page
def test_an_old_workflow_opens(web: ComfyPage) -> None:
    web.load_prompt({"model": tp_loader(MODEL, 3)})
    workflow = web.page.evaluate("app.graph.serialize()")
    (saved,) = workflow["nodes"]
    for slot in saved["inputs"]:
        if slot["name"] == "unet_name":
            slot["name"] = slot["widget"]["name"] = "model_name"
    web.load(workflow)
    assert web.widget(OURS, "unet_name") == MODEL
    assert web.widget(OURS, "gpu_count") == "3"
    names = "app.graph.nodes[0].inputs.map(({ name }) => name)"
    assert "model_name" not in web.page.evaluate(names)


@every_page
def test_a_workflow_whose_type_alone_was_edited(web: ComfyPage) -> None:
    """As a person edits a JSON; in a subgraph, which shows the file, too."""
    web.load_prompt(stock_prompt() | {"other": stock_loader(MODEL)})
    web.page.evaluate(PREPARE)
    sent, before = web.prompt(), loaders(web)
    web.page.evaluate(
        """async () => {
            const saved = JSON.stringify((app.rootGraph ?? app.graph).serialize());
            await app.loadGraphData(
                JSON.parse(saved.replaceAll('"type":"UNETLoader"', '"type":"TPLoadDiffusionModel"'))
            );
        }"""
    )
    assert loaders(web) == [loader | {"type": OURS} for loader in before]
    ours = [item["inputs"] for item in web.prompt().values() if item["class_type"] == OURS]
    stock = [item["inputs"] for item in sent.values() if item["class_type"] == STOCK]
    assert [inputs["unet_name"] for inputs in ours] == [inputs["unet_name"] for inputs in stock]
    assert {inputs["gpu_count"] for inputs in ours} == {"auto"}


@every_page
def test_the_search_finds_ours(web: ComfyPage) -> None:
    """With the words for the stock loader; by "unet" where ComfyUI knows other names of nodes.

    The page finds by those names, but ranks by ids and titles, and by how often a node is used:
    four of ComfyUI's begin with "unet", and come first.
    """
    web.load_prompt({"model": stock_loader(MODEL)})
    ours = "Load Diffusion Model (TP)"
    found = web.search("load diffusion model")
    assert ours in found[:2], found
    newer = "search_aliases" in web.server.get(f"/object_info/{OURS}")[OURS]
    if newer:
        for words in ("unet loader", "load unet"):
            found = web.search(words)
            assert ours in found[:3], found
        found = web.search("unet")
        assert ours in found[:6], found  # all of them are seen at once
        found = web.search("tensor parallel")
        assert set(found[:3]) == {ours, "Load Checkpoint (TP)", "TP Sampler"}, found
