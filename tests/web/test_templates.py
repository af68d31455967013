"""Every template opens in the page with all its nodes, and what the page sends for it runs."""

import json
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest

from support.comfy_page import ComfyPage
from support.comfy_server import PACK_FOLDER
from support.paths import REPOSITORY, TOY_PACK
from support.workflows import Prompt

pytestmark = pytest.mark.web

TEMPLATES = sorted((REPOSITORY / "example_workflows").glob("*.json"))
OF_THE_TOY = TOY_PACK / "example_workflows" / "shapes.json"


def small(prompt: Prompt) -> Prompt:
    """The same prompt for a small picture in few steps."""
    sizes = {"steps": 2, "width": 128, "height": 128, "megapixels": 0.02}
    for node in prompt.values():
        for name in sizes.keys() & node["inputs"].keys():
            node["inputs"][name] = sizes[name]
    return prompt


@pytest.mark.rotates(5)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_opens_and_runs(web: ComfyPage, template: Path) -> None:
    web.load(json.loads(template.read_text()))
    unknown = web.page.evaluate(
        "app.graph.nodes.map(({ type }) => type)"
        ".filter((type) => !(type in LiteGraph.registered_node_types))"
    )
    assert unknown == []
    web.fit_view()
    prompt = small(web.prompt())
    example = web.server.base / "input" / "example.png"
    if not example.exists():
        example.write_bytes((REPOSITORY / "icon.png").read_bytes())
    history = web.server.run(prompt)
    (picture,) = web.server.pictures(history)
    assert picture.stat().st_size > 0


def test_the_browser_of_templates_lists_them(web: ComfyPage) -> None:
    listed = web.server.get("/api/workflow_templates")[PACK_FOLDER]
    assert sorted(listed) == [path.stem for path in TEMPLATES]
    for name in listed:
        url = f"{web.server.url}/api/workflow_templates/{PACK_FOLDER}/{quote(name)}.jpg"
        with urllib.request.urlopen(url, timeout=60) as reply:
            assert reply.headers["Content-Type"] == "image/jpeg"
    web.run_command("Comfy.BrowseTemplates")
    dialog = web.page.get_by_role("dialog")
    dialog.get_by_text(PACK_FOLDER).first.click()
    dialog.get_by_text("Z-Image-Turbo - text to image").first.click()
    web.page.wait_for_function("app.graph.nodes.some((node) => node.comfyClass === 'TPSampler')")


@pytest.mark.parametrize("template", [*TEMPLATES, OF_THE_TOY], ids=lambda path: path.stem)
def test_no_node_lies_on_another(template: Path) -> None:
    """With the heights that the loader and TP Sampler have on the page."""
    nodes = json.loads(template.read_text())["nodes"]
    boxes = [(*node["pos"], *node["size"]) for node in nodes]
    for index, (x, y, width, height) in enumerate(boxes):
        for x2, y2, width2, height2 in boxes[index + 1 :]:
            apart = x + width <= x2 or x2 + width2 <= x
            assert apart or y + height + 40 <= y2 or y2 + height2 + 40 <= y  # and a title
    heights = {node["type"]: node["size"][1] for node in nodes}
    assert heights["TPLoadDiffusionModel"] >= 262
    assert heights.get("TPSampler", 346) >= 346  # some have a stock sampler
