"""Screens of what the pack shows, for a person to look at: `out/web/screen_*.png`.

What a program can see of them is asserted: no text is cut off, and nothing lies beyond its node.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Locator

from support.comfy_page import GROUPS, PICTURES, ComfyPage
from support.comfy_server import PACK_FOLDER
from support.workflows import text_to_latent, tp_loader

pytestmark = [pytest.mark.web, pytest.mark.rotates(3)]
every_page = pytest.mark.every_page

MODEL = "z_image_turbo_bf16.safetensors"
LOADER, SAMPLER = "TPLoadDiffusionModel", "TPSampler"
WARNING = "No CUDA GPU is visible: the model runs on 2 CPU processes. Results are right, but slow."
# What of our nodes reaches beyond their right or lower edge, and how far in pixels at a scale of 1:
# of their notes and, where nodes are drawn in HTML, of all that is in them.
BEYOND = """(types) => app.graph.nodes.filter(({ comfyClass, subgraph }) =>
    subgraph || types.includes(comfyClass)).flatMap((node) => {
        const { scale } = app.canvas.ds;
        const html = document.querySelector(`[data-node-id='${node.id}']`);
        const [x, y] = app.canvasPosToClientPos(
            [node.pos[0] + node.size[0], node.pos[1] + node.size[1]]);
        const { right, bottom } = html?.getBoundingClientRect() ?? { right: x, bottom: y };
        const notes = (node.widgets ?? []).map(({ element }) => element).filter(Boolean);
        const inside = html ? [...html.querySelectorAll('*')] : notes;
        return inside.filter((one) => one.textContent && one.offsetParent)
            .filter((one) => !one.parentElement.closest('.tp-note'))  // these scroll
            .map((one) => [one.getBoundingClientRect(), one])
            .map(([box, one]) => [one.textContent, (box.right - right) / scale,
                (box.bottom - bottom) / scale])
            .filter(([, across, down]) => across > 2 || down > 2);
    })"""
INTO_SUBGRAPH = """(types) => {
    const nodes = app.graph.nodes.filter(({ comfyClass }) => types.includes(comfyClass));
    const { subgraph, id } = app.graph.convertToSubgraph(new Set(nodes)).node;
    const loader = subgraph.nodes.find(({ comfyClass }) => comfyClass === types[0]);
    for (const name of ['unet_name', 'gpu_count']) {
        const slot = loader.inputs.find((input) => input.name === name);
        subgraph.addInput(name, 'COMBO').connect(slot, loader);
    }
    return `${id}:${subgraph.nodes.find(({ comfyClass }) => comfyClass === types[1]).id}`;
}"""


@pytest.fixture(params=["dark", "light"])
def palette(web: ComfyPage, request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    web.set_palette(name)
    yield name
    web.server.post("/settings", {"Comfy.ColorPalette": "dark"})


def test_the_tab(web: ComfyPage, palette: str) -> None:
    web.open_tab()
    panel = web.page.locator(".tp-panel")
    for groups in ((), *((group,) for group in GROUPS)):
        web.show_groups(*groups)
        for summary in panel.get_by_text("End of the log").all():
            if summary.is_visible():
                summary.click()
        web.page.wait_for_timeout(200)
        assert web.cut_off(panel) == []
        keep(web, f"tab_{groups[0]['state'] if groups else 'empty'}_{palette}", panel)


@every_page
def test_nodes(web: ComfyPage, palette: str) -> None:
    """With what works, a warning, and what they run on; none of it outside of them."""
    prompt = text_to_latent(tp_loader(MODEL, 2), SAMPLER)
    web.load_prompt(prompt)
    shown(web)
    assert beyond(web) == []
    ids = web.page.evaluate(
        "(types) => types.map((type) => app.graph.nodes.find(({ comfyClass }) =>"
        " comfyClass === type).id)",
        [LOADER, SAMPLER],
    )
    mark(web, str(ids[1]))
    web.tell("warning", {"node": str(ids[0]), "text": WARNING})
    shown(web)
    keep(web, f"nodes_{palette}")
    assert beyond(web) == []


@every_page
def test_a_subgraph(web: ComfyPage) -> None:
    """Which shows the file and the count, and what it runs on."""
    web.load_prompt(text_to_latent(tp_loader(MODEL, 2), SAMPLER))
    web.page.wait_for_timeout(500)
    sampler = web.page.evaluate(INTO_SUBGRAPH, [LOADER, SAMPLER])
    mark(web, sampler)
    shown(web)
    keep(web, "subgraph_outside")
    assert beyond(web) == []
    web.page.evaluate(
        "() => app.canvas.setGraph(app.graph.nodes.find((node) => node.subgraph).subgraph)"
    )
    shown(web)
    keep(web, "subgraph_inside")
    assert beyond(web) == []


def test_the_browser_of_templates(web: ComfyPage) -> None:
    web.run_command("Comfy.BrowseTemplates")
    dialog = web.page.get_by_role("dialog")
    dialog.get_by_text(PACK_FOLDER).first.click()
    dialog.get_by_text("Z-Image-Turbo - text to image").first.wait_for()
    web.page.wait_for_timeout(2000)  # its pictures
    keep(web, "templates")


def test_the_settings(web: ComfyPage) -> None:
    web.run_command("Comfy.ShowSettingsDialog")
    dialog = web.page.get_by_role("dialog")
    dialog.get_by_text("Tensor Parallel", exact=True).first.click()
    dialog.get_by_text("Python of the GPU processes").first.wait_for()
    web.page.wait_for_timeout(500)
    keep(web, "settings")
    first = dialog.locator("input[id^='TensorParallel']").first
    assert first.get_attribute("id") == "TensorParallel.Runtime.Python"
    field = first.bounding_box()
    assert field is not None
    assert field["width"] >= 360  # a path is long


def mark(web: ComfyPage, sampler: str) -> None:
    """Have the page show a group, which a sampler runs on."""
    group: dict[str, Any] = GROUPS[1]
    (model,) = group["models"]
    web.show_groups(group)
    web.tell("node", {"node": sampler, "group": group["id"], "model": model})


def shown(web: ComfyPage) -> None:
    """The whole workflow on the screen, with the answers that the nodes wait for."""
    web.page.evaluate("() => app.canvas.deselectAll()")
    web.fit_view()


def beyond(web: ComfyPage) -> list[Any]:
    return list(web.page.evaluate(BEYOND, [LOADER, SAMPLER]))


def keep(web: ComfyPage, name: str, part: Locator | None = None) -> None:
    """A picture of the page, or of a part of it."""
    (part or web.page).screenshot(path=PICTURES / f"screen_{name}_{web.name}.png")
