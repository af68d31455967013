"""The nodes of the pack inside subgraphs, on both sides of a subgraph's border."""

import time
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.comfy_page import ComfyPage
from support.workflows import Prompt, Sampling, text_to_latent, tp_loader

pytestmark = [pytest.mark.web, pytest.mark.every_page]

MODEL = "tiny_z_image.safetensors"
BOTH = ("TPLoadDiffusionModel", "TPSampler")
START_MS = 240_000

# Node type → what every node of it has, wherever it is.
SEEN = """() => {
    const found = {};
    const look = (graph) => graph.nodes.forEach((node) => {
        const count = node.widgets?.find(({ name }) => name === 'gpu_count');
        found[node.subgraph ? 'host' : node.comfyClass] = {
            counts: count?.options.values,
            count: count?.value,
            badges: node.badges.map((badge) => (typeof badge === 'function' ? badge() : badge).text)
                .filter((text) => text?.includes('×')),
        };
        if (node.subgraph) look(node.subgraph);
    });
    look(app.rootGraph ?? app.graph);
    return found;
}"""
INTO_SUBGRAPH = """(types) => {
    const nodes = app.graph.nodes.filter(({ comfyClass }) => types.includes(comfyClass));
    app.graph.convertToSubgraph(new Set(nodes));
}"""
PROMOTE = """(input) => {
    const { subgraph } = app.graph.nodes.find((node) => node.subgraph);
    const loader = subgraph.nodes.find(({ comfyClass }) => comfyClass === 'TPLoadDiffusionModel');
    const slot = loader.inputs.find(({ name }) => name === input);
    subgraph.addInput(input, 'COMBO').connect(slot, loader);
}"""
REOPEN = "async () => app.loadGraphData((app.rootGraph ?? app.graph).serialize())"


def prompt() -> Prompt:
    """With a seed of its own: what ComfyUI knows already, it does not run."""
    sampling = Sampling(seed=time.monotonic_ns() % 2**32, steps=2)
    return text_to_latent(tp_loader(MODEL, 2), "TPSampler", sampling)


def seen(web: ComfyPage) -> dict[str, Any]:
    return dict(web.page.evaluate(SEEN))


def wait_for_counts(web: ComfyPage, *kinds: str) -> None:
    """Until all of these offer what the model can have: everything but 7."""
    web.page.wait_for_function(
        f"(kinds) => {{ const seen = ({SEEN})(); return kinds.every((kind) =>"
        " seen[kind]?.counts?.includes('6') && !seen[kind].counts.includes('7')); }",
        arg=list(kinds),
    )


@pytest.mark.parametrize("inside", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "loader", "sampler"])
def test_counts_and_badges(web: ComfyPage, inside: tuple[str, ...]) -> None:
    """`web` also asserts that the page's scripts raise nothing."""
    web.load_prompt(prompt())
    wait_for_counts(web, *BOTH)
    web.page.evaluate(INTO_SUBGRAPH, list(inside))
    wait_for_counts(web, *BOTH)
    web.page.evaluate(REOPEN)
    wait_for_counts(web, *BOTH)
    web.press_run()
    web.page.wait_for_function(
        f"() => {{ const seen = ({SEEN})();"
        " return ['host', 'TPSampler', 'TPLoadDiffusionModel'].every((kind) =>"
        " seen[kind].badges.some((text) => text.startsWith('2× · '))); }",
        timeout=START_MS,
    )


def test_a_file_that_cannot_run(web: ComfyPage) -> None:
    """It is said before the run, and greys the counts; another file takes that back."""
    disabled = (
        "(wanted) => app.graph.nodes.flatMap(({ widgets }) => widgets ?? [])"
        ".filter(({ name }) => name === 'gpu_count')"
        ".every((widget) => Boolean(widget.disabled) === wanted)"
    )
    choose = (
        "(name) => { const widget = app.graph.nodes.find(({ comfyClass }) => comfyClass ==="
        " 'TPLoadDiffusionModel').widgets.find(({ name }) => name === 'unet_name');"
        " widget.value = name; widget.callback(name); }"
    )
    web.load_prompt(prompt())
    wait_for_counts(web, *BOTH)
    web.page.evaluate(choose, "gone.safetensors")
    web.page.wait_for_function(disabled, arg=True)
    assert web.page.get_by_text("There is no model 'gone.safetensors'").count() >= 1
    web.page.evaluate(choose, MODEL)
    web.page.wait_for_function(disabled, arg=False)
    wait_for_counts(web, *BOTH)


def test_a_count_that_the_subgraph_shows(web: ComfyPage) -> None:
    web.load_prompt(prompt())
    web.page.evaluate(INTO_SUBGRAPH, list(BOTH[:1]))
    web.page.evaluate(PROMOTE, "gpu_count")
    wait_for_counts(web, "host")
    web.page.evaluate(
        "app.graph.nodes.find((node) => node.subgraph).widgets"
        ".find(({ name }) => name === 'gpu_count').value = '7'"
    )
    web.page.evaluate(REOPEN)
    wait_for_counts(web, "host")
    web.page.get_by_text("gpu_count 7 → 6").last.wait_for()
    sent = web.prompt()
    (loader,) = [node for node in sent.values() if node["class_type"] == BOTH[0]]
    assert loader["inputs"]["gpu_count"] == "6"


def test_a_file_that_the_subgraph_shows(web: ComfyPage) -> None:
    """What is chosen there counts at once."""
    other = "zz_no_model.safetensors"
    save_file({"conv_in.weight": torch.zeros(4, 4)}, web.server.models / "diffusion_models" / other)
    web.open()  # with the file in its lists
    web.load_prompt(prompt())
    web.page.evaluate(INTO_SUBGRAPH, list(BOTH[:1]))
    web.page.evaluate(PROMOTE, "unet_name")
    wait_for_counts(web, "TPSampler")
    web.page.evaluate("() => app.canvas.deselectAll()")
    web.fit_view()
    host = web.page.evaluate("app.graph.nodes.find((node) => node.subgraph).type")
    web.choices(host, "unet_name").get_by_text(other, exact=True).click()
    web.page.wait_for_function(
        "app.graph.nodes.find(({ comfyClass }) => comfyClass === 'TPSampler').widgets"
        ".find(({ name }) => name === 'gpu_count').disabled"
    )
