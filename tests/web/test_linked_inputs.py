"""Inputs of a loader that another node gives: what its own widget still holds does not count."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.comfy_page import ComfyPage
from support.workflows import Prompt, Sampling, stock_loader, text_to_latent, tp_loader

pytestmark = [pytest.mark.web, pytest.mark.every_page]

MODEL, GONE = "tiny_z_image.safetensors", "gone.safetensors"
LOADER, SAMPLER, STOCK = "TPLoadDiffusionModel", "TPSampler", "UNETLoader"
ALL = ["auto", *map(str, range(1, 9))]
OF_THE_MODEL = [count for count in ALL if count != "7"]

# A node of the page alone, of whose output nothing is known before it runs.
UNKNOWN = "TestUnknown"
REGISTER = """([type, output]) => {
    class Unknown extends LGraphNode {
        constructor(title) {
            super(title);
            this.addOutput('value', output);
        }
    }
    LiteGraph.registerNodeType(type, Unknown);
}"""
LINK = """([from, to, input]) => {
    const source = LiteGraph.createNode(from);
    app.graph.add(source);
    const target = app.graph.nodes.find(({ type, subgraph }) => to ? type === to : subgraph);
    source.connect(0, target, target.inputs.findIndex(({ name }) => name === input));
}"""
INTO_SUBGRAPH = """(wanted) => {
    const loader = app.graph.nodes.find(({ type }) => type === wanted);
    const { subgraph } = app.graph.convertToSubgraph(new Set([loader])).node;
    const [inner] = subgraph.nodes;
    const slot = inner.inputs.find(({ name }) => name === 'unet_name');
    subgraph.addInput('unet_name', 'COMBO').connect(slot, inner);
}"""
# The first node of a type, wherever it is.
FIND = """const find = (type, graph = app.graph) => graph.nodes.flatMap((node) =>
    [...(node.type === type ? [node] : []), ...(node.subgraph ? find(type, node.subgraph) : [])]);
"""
# As a person sets it; without a name, the first widget.
SET = f"""([wanted, widgetName, value]) => {{
    {FIND}
    const widget = find(wanted)[0].widgets.find(({{ name }}) => name === (widgetName ?? name));
    widget.value = value;
    widget.callback?.(value);
}}"""
# Whether a node offers these counts; null: none, since its file or its GPUs cannot be used.
OFFERS = f"""([wanted, counts]) => {{
    {FIND}
    const widget = find(wanted)[0].widgets.find(({{ name }}) => name === 'gpu_count');
    const offered = widget.disabled ? null : widget.options.values;
    return JSON.stringify(offered) === JSON.stringify(counts);
}}"""


def prompt() -> Prompt:
    return text_to_latent(tp_loader(MODEL, 2), "TPSampler", Sampling(steps=1))


def change(web: ComfyPage, node_type: str, widget: str | None, value: str) -> None:
    web.page.evaluate(SET, [node_type, widget, value])


def wait_for_counts(web: ComfyPage, counts: list[str] | None) -> None:
    """Until the loader offers these, and the sampler the same."""
    for node_type, first in ((LOADER, []), (SAMPLER, ["from model"])):
        expected = counts and [*first, *counts]
        web.page.wait_for_function(OFFERS, arg=[node_type, expected])


@pytest.mark.parametrize(
    ("source", "name", "good", "bad"),
    [("PrimitiveNode", "unet_name", MODEL, GONE), ("PrimitiveString", "devices", "", "9")],
)
def test_what_a_primitive_gives_counts(
    web: ComfyPage, source: str, name: str, good: str, bad: str
) -> None:
    web.load_prompt(prompt())
    wait_for_counts(web, OF_THE_MODEL)
    web.page.evaluate(LINK, [source, LOADER, name])
    for given, left, expected in ((bad, good, None), (good, bad, OF_THE_MODEL)):
        change(web, source, None, given)
        change(web, LOADER, name, left)
        change(web, LOADER, "where", "this machine")
        wait_for_counts(web, expected)


@pytest.mark.parametrize(
    ("name", "left", "counts"),
    [("unet_name", GONE, None), ("devices", "9", None), ("layout", "2x2", ["auto", "4"])],
)
def test_what_is_not_known_refuses_nothing(
    web: ComfyPage, name: str, left: str, counts: list[str] | None
) -> None:
    web.load_prompt(prompt())
    web.page.evaluate(REGISTER, [UNKNOWN, "STRING" if name == "devices" else "COMBO"])
    wait_for_counts(web, OF_THE_MODEL)
    change(web, LOADER, "gpu_count", "4")
    change(web, LOADER, name, left)
    wait_for_counts(web, counts)
    web.page.evaluate(LINK, [UNKNOWN, LOADER, name])
    wait_for_counts(web, ALL)
    change(web, LOADER, "gpu_count", "7")
    change(web, LOADER, "where", "this machine")
    web.page.wait_for_timeout(1000)
    wait_for_counts(web, ALL)
    assert web.widget(LOADER, "gpu_count") == "7"


def test_what_a_primitive_is_given_is_not_known(web: ComfyPage) -> None:
    web.load_prompt(prompt())
    web.page.evaluate(REGISTER, [UNKNOWN, "STRING"])
    web.page.evaluate(LINK, ["PrimitiveString", LOADER, "devices"])
    change(web, "PrimitiveString", None, "9")
    change(web, LOADER, "where", "this machine")
    wait_for_counts(web, None)
    web.page.evaluate(LINK, [UNKNOWN, "PrimitiveString", "value"])
    wait_for_counts(web, ALL)


def test_a_link_into_a_subgraph(web: ComfyPage) -> None:
    """To an input that a subgraph shows of its loader, from outside."""
    web.load_prompt(prompt())
    web.page.evaluate(REGISTER, [UNKNOWN, "COMBO"])
    wait_for_counts(web, OF_THE_MODEL)
    web.page.evaluate(INTO_SUBGRAPH, LOADER)
    for source, counts in ((UNKNOWN, ALL), ("PrimitiveNode", OF_THE_MODEL)):
        web.page.evaluate(LINK, [source, None, "unet_name"])
        if source != UNKNOWN:
            change(web, source, None, MODEL)
        change(web, LOADER, "unet_name", GONE)
        wait_for_counts(web, counts)


def test_a_count_that_a_primitive_gives(web: ComfyPage) -> None:
    """It is changed there: what the loader's own widget holds is not sent."""
    web.load_prompt(prompt())
    web.page.evaluate(LINK, ["PrimitiveNode", LOADER, "gpu_count"])
    change(web, "PrimitiveNode", None, "7")
    change(web, LOADER, "where", "this machine")
    web.page.get_by_text("gpu_count 7 → 6").last.wait_for()
    sent: dict[str, Any] = web.prompt()["model"]["inputs"]
    assert sent["gpu_count"] == "6"


@pytest.mark.parametrize(
    ("source", "given", "left", "swapped"),
    [
        (UNKNOWN, None, "another_model.safetensors", True),
        ("PrimitiveNode", MODEL, "another_model.safetensors", True),
        ("PrimitiveNode", "another_model.safetensors", MODEL, False),
    ],
)
def test_the_swap_goes_by_the_file_that_is_used(
    web: ComfyPage, source: str, given: str | None, left: str, *, swapped: bool
) -> None:
    other = web.server.models / "diffusion_models" / "another_model.safetensors"
    save_file({"conv_in.weight": torch.zeros(4, 4)}, other)
    web.open()  # with the file in its lists
    web.load_prompt(text_to_latent(stock_loader(MODEL), sampling=Sampling(steps=1)))
    web.page.evaluate(REGISTER, [UNKNOWN, "COMBO"])
    web.page.evaluate(LINK, [source, STOCK, "unet_name"])
    if given is not None:
        change(web, source, None, given)
    change(web, STOCK, "unet_name", left)
    web.run_command("TensorParallel.UseInWorkflow")
    if not swapped:
        web.page.get_by_text("another_model.safetensors").last.wait_for()
    web.page.wait_for_function(
        "(wanted) => app.graph.nodes.some(({ type }) => type === wanted)",
        arg=LOADER if swapped else STOCK,
    )
