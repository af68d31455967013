"""Every template opens in the page with all its nodes, and what the page sends for it runs."""

import json
import urllib.request
from pathlib import Path

import pytest

from support.comfy_page import ComfyPage
from support.comfy_server import PACK_FOLDER
from support.paths import REPOSITORY
from support.workflows import Prompt

pytestmark = pytest.mark.web

TEMPLATES = sorted((REPOSITORY / "example_workflows").glob("*.json"))


def small(prompt: Prompt) -> Prompt:
    """The same prompt for a small picture in few steps."""
    sizes = {"steps": 2, "width": 128, "height": 128, "megapixels": 0.02}
    for node in prompt.values():
        for name in sizes.keys() & node["inputs"].keys():
            node["inputs"][name] = sizes[name]
    return prompt


@pytest.mark.rotates(3)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_opens_and_runs(web: ComfyPage, template: Path) -> None:
    web.load(json.loads(template.read_text()))
    unknown = web.page.evaluate(
        "app.graph.nodes.map(({ type }) => type)"
        ".filter((type) => !(type in LiteGraph.registered_node_types))"
    )
    assert unknown == []
    web.run_command("Comfy.Canvas.FitView")
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
        url = f"{web.server.url}/api/workflow_templates/{PACK_FOLDER}/{name}.jpg"
        with urllib.request.urlopen(url, timeout=10) as reply:
            assert reply.headers["Content-Type"] == "image/jpeg"
    web.run_command("Comfy.BrowseTemplates")
    dialog = web.page.get_by_role("dialog")
    dialog.get_by_text(PACK_FOLDER).first.click()
    dialog.get_by_text("z_image_text_to_image").first.click()
    web.page.wait_for_function("app.graph.nodes.some((node) => node.comfyClass === 'TPSampler')")
