"""Writes the pictures of README.md and of the nodes' help pages, from ComfyUI's running page.

    python scripts/make_pictures.py

Runs the example of `examples/shapes` on two ranks, on the CPU.
"""

import io
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.comfy_page import ComfyPage, chromium, comfy_page  # noqa: E402
from support.comfy_server import ComfyServer  # noqa: E402
from support.paths import TOY_PACK  # noqa: E402
from support.workflows import node  # noqa: E402

README = REPOSITORY / "docs/images"
HELP = REPOSITORY / "web/docs/images"
START_MS = 240_000
MARGIN = 40


def save(shot: bytes, path: Path, width: int) -> None:
    """Write a screenshot, not wider than `width`, in few colours."""
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.relative_to(REPOSITORY))


def nodes(page: ComfyPage, path: Path, *types: str) -> None:
    """A picture of the nodes of these types and what is between them."""
    box: dict[str, Any] = page.page.evaluate(
        """([types, margin]) => {
            const nodes = app.graph.nodes.filter((node) => types.includes(node.comfyClass));
            const [left, top] = [0, 1].map((i) => Math.min(...nodes.map(({ pos }) => pos[i])));
            const [right, bottom] = [0, 1].map((i) =>
                Math.max(...nodes.map(({ pos, size }) => pos[i] + size[i])));
            const [x, y] = app.canvasPosToClientPos([left - margin / 2, top - 2 * margin]);
            const [x2, y2] = app.canvasPosToClientPos([right + margin / 2, bottom + margin / 2]);
            return { x, y, width: x2 - x, height: y2 - y };
        }""",
        [list(types), MARGIN],
    )
    save(page.page.screenshot(clip=box), path, 900)


def run(page: ComfyPage, gpu_count: int) -> None:
    """The example's template on so many ranks, until its picture is there."""
    workflow = TOY_PACK / "example_workflows/shapes.json"
    page.page.evaluate("(text) => app.loadGraphData(JSON.parse(text))", workflow.read_text())
    page.page.evaluate(
        """(gpu_count) => {
            for (const node of app.graph.nodes.filter(
                (node) => node.comfyClass === 'TPLoadDiffusionModel'))
                node.widgets.find(({ name }) => name === 'gpu_count').value = gpu_count;
        }""",
        str(gpu_count),
    )
    page.run_command("Comfy.Canvas.FitView")
    page.press_run()
    page.page.wait_for_function(
        "app.graph.nodes.some((node) => node.comfyClass === 'SaveImage' && node.imgs?.length)",
        timeout=START_MS,
    )
    page.page.wait_for_timeout(1500)


def end_node(page: ComfyPage, node_type: str) -> None:
    """Put a node after the sampler and run it."""
    page.page.evaluate(
        """(type) => {
            const sampler = app.graph.nodes.find((node) => node.comfyClass === 'TPSampler');
            for (const node of app.graph.nodes.filter(({ pos }) => pos[0] > sampler.pos[0]))
                app.graph.remove(node);
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            node.pos = [sampler.pos[0] + sampler.size[0] + 60, sampler.pos[1]];
            node.setSize([360, 300]);
            sampler.connect(0, node, 0);
        }""",
        node_type,
    )
    page.press_run()
    page.page.wait_for_timeout(4000)


def checkpoint(page: ComfyPage, name: str) -> None:
    """The loader of a checkpoint, and what takes its three outputs."""
    prompt = {
        "load": node("TPLoadCheckpoint", ckpt_name=name, gpu_count="2"),
        "sampler": node("TPSampler", model=["load", 0]),
        "text": node("CLIPTextEncode", clip=["load", 1], text="a red circle on blue"),
        "decode": node("VAEDecode", vae=["load", 2]),
    }
    page.load_prompt(prompt)
    places = {
        "TPLoadCheckpoint": (0, 0),
        "TPSampler": (400, 0),
        "CLIPTextEncode": (400, 500),
        "VAEDecode": (400, 740),
    }
    page.page.evaluate(
        "(places) => { for (const node of app.graph.nodes) node.pos = places[node.comfyClass];"
        " app.canvas.ds.scale = 0.7; app.canvas.ds.offset = [120, 200];"
        " app.canvas.setDirty(true, true); }",
        places,
    )
    page.page.wait_for_timeout(3000)
    nodes(page, HELP / "checkpoint.png", *places)


def main() -> None:
    """Write them all."""
    gpu_free = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with (
        ComfyServer(env=gpu_free, pack=TOY_PACK) as server,
        chromium() as browser,
        comfy_page(browser, server) as page,
    ):
        checkpoints = server.models / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        (model,) = (TOY_PACK / "models/diffusion_models").glob("*.safetensors")
        (checkpoints / model.name).symlink_to(model)
        page.open({"Comfy.Minimap.Visible": False})
        checkpoint(page, model.name)
        run(page, 2)
        nodes(page, HELP / "nodes.png", "TPLoadDiffusionModel", "TPSampler")
        page.open_tab()
        # Beside the tab, which covers a part of the canvas.
        page.page.evaluate(
            "() => { app.canvas.ds.scale = 0.64; app.canvas.ds.offset = [530, 230];"
            " app.canvas.setDirty(true, true); }"
        )
        page.page.wait_for_timeout(1500)
        save(page.page.screenshot(), README / "page.png", 1200)
        tab = page.page.locator(".tp-card")
        save(tab.screenshot(), README / "tab.png", 500)
        for node_type, name in (("TPRuntimeInfo", "info"), ("TPReleaseRuntime", "release")):
            run(page, 2)
            end_node(page, node_type)
            nodes(page, HELP / f"{name}.png", "TPSampler", node_type)


if __name__ == "__main__":
    main()
