"""ComfyUI's official templates of the supported families, swapped in the page and run over HTTP.

They are not installed with the ComfyUI that CI tests: `COMFYUI_TEMPLATES` names a folder of them
(CONTRIBUTING.md, "A newer ComfyUI"). `--write-templates` keeps what came of each, and
`python tests/support/compatibility_table.py` writes that into `docs/compatibility.md`.

They are run as the page with nodes on the canvas sends them. Where nodes are drawn in HTML
("Nodes 2.0"), the page sends the very same.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
from playwright.sync_api import Browser

from support.comfy_page import NEWER_PAGE, ComfyPage, comfy_page
from support.comfy_server import NO_GPU, ComfyServer
from support.compatibility import NEWER
from support.leaks import nothing_left_over
from support.official_templates import (
    LEFT_OUT,
    Outcome,
    Template,
    outcome,
    record,
    recorded,
    templates,
)
from support.paths import NEWER_FRONTEND
from support.template_files import model_of, write_files_of
from support.workflows import Prompt

pytestmark = pytest.mark.web

# Of those that CI has, some with a UNETLoader, one of them in a subgraph, or a
# CheckpointLoaderSimple.
SOME = ("01_qwen_t2i_subgraphed", "flux_dev_checkpoint_example", "flux_dev_full_text_to_image")

STOCK = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}
OURS = {"TPLoadDiffusionModel": "unet_name", "TPLoadCheckpoint": "ckpt_name"}
# Whose stock prompt is another one where nodes are drawn in HTML: ComfyUI's Painter keeps its empty
# drawing in a file there, whose name has the time.
OTHERWISE_IN_HTML = ("video_wan2_1_infinitetalk",)
# The page has this widget send nothing, once it has looked at the video: sooner or later.
PREVIEW = "video-preview"
UNKNOWN = """() => {
    const found = new Set();
    const look = (graph) => graph.nodes.forEach((node) => {
        if (node.subgraph) look(node.subgraph);
        else if (!(node.type in LiteGraph.registered_node_types)) found.add(node.type);
    });
    look(app.rootGraph ?? app.graph);
    return [...found].sort();
}"""


@dataclass(frozen=True)
class Sent:
    """What the page sends for a template before and after the swap; the nodes it does not know."""

    stock: Prompt
    ours: Prompt
    unknown: tuple[str, ...] = ()

    def swapped(self) -> Prompt:
        """The nodes that the swap has changed."""
        return {name: item for name, item in self.ours.items() if item != self.stock[name]}


@pytest.fixture(scope="module")
def server() -> Iterator[ComfyServer]:
    """One of its own: others have larger files under the names that the templates load."""
    if not NEWER and not NEWER_FRONTEND.is_dir():
        pytest.skip("there is no newer frontend: `make comfyui` fetches it")
    options = ("--cpu",) if NEWER else NEWER_PAGE
    with nothing_left_over(), ComfyServer(env=NO_GPU, extra_args=options) as server:
        yield server


@pytest.fixture(scope="module")
def sent(browser: Browser, server: ComfyServer, request: pytest.FixtureRequest) -> dict[str, Sent]:
    """Template → what is sent for it. All at once: an open page takes a core from what runs."""
    with comfy_page(browser, server) as page:
        return {template.name: opened(page, template) for template in asked_for(request)}


@pytest.fixture(scope="module")
def sent_in_html(
    browser: Browser, server: ComfyServer, request: pytest.FixtureRequest
) -> dict[str, Sent]:
    """The same of a page whose nodes are drawn in HTML."""
    with comfy_page(browser, server, html=True) as page:
        return {template.name: opened(page, template) for template in asked_for(request)}


def asked_for(request: pytest.FixtureRequest) -> dict[Template, None]:
    """The templates of the tests that were asked for, in their order."""
    tests = [item for item in request.session.items if item.path == request.path]
    found = [item.callspec.params["template"] for item in tests]  # type: ignore[attr-defined]
    return {template: None for template in found if isinstance(template, Template)}


@pytest.fixture(scope="module")
def outcomes(pytestconfig: pytest.Config) -> Iterator[dict[str, Outcome]]:
    """What came of the templates, which is kept at the end if it is asked for."""
    found: dict[str, Outcome] = {}
    yield found
    if pytestconfig.option.write_templates:
        record(found)


@pytest.mark.skipif(not NEWER, reason="today's templates need ComfyUI 0.33")
@pytest.mark.parametrize("template", templates(), ids=lambda template: template.name)
def test_a_template(
    server: ComfyServer,
    sent: dict[str, Sent],
    template: Template,
    outcomes: dict[str, Outcome],
    pytestconfig: pytest.Config,
) -> None:
    of = sent[template.name]
    if (why := LEFT_OUT.get(template.name)) is not None:
        came = Outcome("left out", why)
    elif of.unknown:
        names = ", ".join(of.unknown)
        came = Outcome("left out", f"nodes that this ComfyUI does not have: {names}")
    else:
        assert_only_the_loaders_changed(of.stock, of.ours)
        came = outcome(server, template, of.stock, of.ours)
    outcomes[template.name] = came
    if not pytestconfig.option.write_templates:
        expected = recorded()[template.name]
        assert asdict(came) == {name: expected[name] for name in ("result", "why")}


@pytest.mark.parametrize(
    "template",
    templates() or [Template(name, (), 0) for name in SOME],
    ids=lambda template: template.name,
)
def test_a_template_in_html(
    sent: dict[str, Sent], sent_in_html: dict[str, Sent], template: Template
) -> None:
    found, on_canvas = sent_in_html[template.name], sent[template.name]
    assert found.unknown == on_canvas.unknown
    assert found.swapped() == on_canvas.swapped()
    if template.name not in OTHERWISE_IN_HTML:
        assert found == on_canvas
    if not template.is_refused and not found.unknown:
        assert_only_the_loaders_changed(found.stock, found.ours)
        assert found.swapped()


def opened(web: ComfyPage, template: Template) -> Sent:
    """Open it, and swap its loaders by the command for whole workflows."""
    web.load(template.workflow)
    if unknown := web.page.evaluate(UNKNOWN):
        return Sent({}, {}, tuple(unknown))
    stock = prompt_of(web)
    of_models = {
        node_id: item
        for node_id, item in stock.items()
        if item["class_type"] in STOCK
        and isinstance(item["inputs"][STOCK[item["class_type"]]], str)
    }
    write_files_of(of_models, web.server.models, web.server.base / "input")
    web.run_command("TensorParallel.UseInWorkflow")
    return Sent(stock, prompt_of(web))


def prompt_of(web: ComfyPage) -> Prompt:
    """What the page sends, without its previews of videos."""
    found: Prompt = web.prompt()
    for item in found.values():
        item["inputs"].pop(PREVIEW, None)
    return found


def assert_only_the_loaders_changed(stock: Prompt, ours: Prompt) -> None:
    """And those alone whose file is of a supported family, and no variant that is refused."""
    assert ours.keys() == stock.keys()
    for node_id, item in stock.items():
        kind, inputs = item["class_type"], item["inputs"]
        found: dict[str, Any] = ours[node_id]
        model = model_of(inputs[STOCK[kind]]) if kind in STOCK else None
        if model is not None and not model.key:
            assert OURS[found["class_type"]] == STOCK[kind]
            assert inputs.items() <= found["inputs"].items()
        else:
            assert found["class_type"] == kind
            assert found["inputs"] == inputs
