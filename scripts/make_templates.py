"""Writes example_workflows/: the templates that ComfyUI's page lists for this pack.

    python scripts/make_templates.py [NAME ...]

Each is built in ComfyUI's own page, which lays down the format. Its file's name is the title that
the page shows, its picture a drawn card (`template_cards.py`). The tests run every template with
tiny models of the same names (`tests/web/test_templates.py`).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

sys.path.insert(0, str(Path(__file__).resolve().parent))

from template_cards import card  # noqa: E402

from support.comfy_page import ComfyPage, chromium, comfy_page  # noqa: E402
from support.comfy_server import ComfyServer  # noqa: E402

FOLDER = REPOSITORY / "example_workflows"
HUB = "https://huggingface.co"
COLUMNS = {"load": 0, "condition": 400, "sample": 860, "save": 1240}
GAP = 80

Link = tuple[str, int]


@dataclass
class Node:
    """A node of a template; `column` is one of `COLUMNS`, filled from the top."""

    type: str
    column: str
    widgets: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    models: list[dict[str, str]] = field(default_factory=list)
    size: tuple[int, int] | None = None


Nodes = dict[str, Node]


def model(folder: str, name: str, url: str) -> dict[str, str]:
    """A file to download: ComfyUI's page offers it where it is missing."""
    return {"name": name, "url": f"{HUB}/{url}", "directory": folder}


# --- what the templates are made of ------------------------------------------------------------


def loader(name: str, url: str) -> Node:
    """Load Diffusion Model (TP), on as many GPUs as the machine has."""
    widgets = {"unet_name": name, "weight_dtype": "default", "gpu_count": "auto"}
    file = model("diffusion_models", name, url)
    return Node("TPLoadDiffusionModel", "load", widgets, models=[file], size=(340, 180))


def clip(kind: str, *files: tuple[str, str]) -> Node:
    """The text encoder, of one file or two."""
    numbers = ("1", "2") if len(files) == 2 else ("",)
    names = {f"clip_name{n}": name for n, (name, _) in zip(numbers, files, strict=True)}
    models = [model("text_encoders", name, url) for name, url in files]
    type_ = "DualCLIPLoader" if len(files) == 2 else "CLIPLoader"
    return Node(type_, "load", {**names, "type": kind}, models=models, size=(340, 110))


def vae(name: str, url: str) -> Node:
    """The VAE."""
    return Node(
        "VAELoader", "load", {"vae_name": name}, models=[model("vae", name, url)], size=(340, 60)
    )


def lora(name: str, url: str) -> Node:
    """A LoRA on the loader's model."""
    return Node(
        "LoraLoaderModelOnly",
        "load",
        {"lora_name": name, "strength_model": 1.0},
        {"model": ("model", 0)},
        [model("loras", name, url)],
        size=(340, 85),
    )


def prompt(text: str) -> Node:
    """What to draw."""
    links: dict[str, Link] = {"clip": ("clip", 0)}
    return Node("CLIPTextEncode", "condition", {"text": text}, links, size=(400, 160))


def no_negative() -> Node:
    """For models without guidance by a negative prompt."""
    return Node("ConditioningZeroOut", "condition", links={"conditioning": ("positive", 0)})


def empty_latent(size: int) -> Node:
    """The size of the picture."""
    widgets = {"width": size, "height": size, "batch_size": 1}
    return Node("EmptySD3LatentImage", "condition", widgets, size=(315, 110))


def shift(value: float, source: str) -> Node:
    """ModelSamplingAuraFlow."""
    return Node("ModelSamplingAuraFlow", "sample", {"shift": value}, {"model": (source, 0)})


def sampler(source: str, positive: str, latent: str, **widgets: Any) -> Node:
    """TP Sampler."""
    links: dict[str, Link] = {
        "model": (source, 0),
        "positive": (positive, 0),
        "negative": ("negative", 0),
        "latent_image": (latent, 0),
    }
    fixed = {"seed": 42, "scheduler": "simple", "denoise": 1.0, "gpu_count": "from model"}
    return Node("TPSampler", "sample", {**fixed, **widgets}, links, size=(315, 320))


def picture(prefix: str) -> Nodes:
    """Decode and save."""
    links: dict[str, Link] = {"samples": ("sampler", 0), "vae": ("vae", 0)}
    saved = {"images": ("decoded", 0)}
    return {
        "decoded": Node("VAEDecode", "save", links=links, size=(210, 50)),
        "saved": Node("SaveImage", "save", {"filename_prefix": prefix}, saved, size=(360, 400)),
    }


def note(text: str) -> Node:
    """A note that the page shows."""
    return Node("MarkdownNote", "save", {"": text}, size=(360, 200))


NOTE = """**{title}**

*gpu_count* `auto` takes as many GPUs of this machine as the model can be split over, if more are \
not slower. Choose another number on the loader{of_sampler}.

Any stock sampler works with this model, too. The **Tensor Parallel** tab at the side shows the \
GPUs' processes, their memory and the time of a step."""


# --- the templates -----------------------------------------------------------------------------

FLUX_CLIP = clip(
    "flux",
    ("clip_l.safetensors", "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors"),
    (
        "t5xxl_fp16.safetensors",
        "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    ),
)
FLUX_VAE = vae(
    "ae.safetensors",
    "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
)
QWEN = "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
QWEN_CLIP = clip(
    "qwen_image",
    (
        "qwen_2.5_vl_7b_fp8_scaled.safetensors",
        f"{QWEN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    ),
)
QWEN_VAE = vae("qwen_image_vae.safetensors", f"{QWEN}/vae/qwen_image_vae.safetensors")
CAT = "A ginger cat asleep on a windowsill, rain on the glass, warm evening light, photograph"
SIGN = 'A bookshop at night, a neon sign in the window that says "OPEN LATE", wet cobblestones'
EDIT = "Make it winter: snow on the ground and on the roofs, keep everything else"


def z_image() -> Nodes:
    """Z-Image-Turbo, text to image."""
    base = "Comfy-Org/z_image_turbo/resolve/main/split_files"
    return {
        "model": loader(
            "z_image_turbo_bf16.safetensors",
            f"{base}/diffusion_models/z_image_turbo_bf16.safetensors",
        ),
        "clip": clip(
            "lumina2",
            ("qwen_3_4b.safetensors", f"{base}/text_encoders/qwen_3_4b.safetensors"),
        ),
        "vae": vae("ae.safetensors", f"{base}/vae/ae.safetensors"),
        "positive": prompt(CAT),
        "negative": no_negative(),
        "latent": empty_latent(1024),
        "shifted": shift(3.0, "model"),
        "sampler": sampler(
            "shifted", "positive", "latent", steps=9, cfg=1.0, sampler_name="res_multistep"
        ),
        **picture("z-image"),
    }


def z_image_lora() -> Nodes:
    """Z-Image-Turbo with a LoRA."""
    nodes = z_image()
    name = "pixel_art_style_z_image_turbo.safetensors"
    nodes["lora"] = lora(name, f"tarn59/pixel_art_style_lora_z_image_turbo/resolve/main/{name}")
    nodes["shifted"].links["model"] = ("lora", 0)
    nodes["positive"].widgets["text"] = f"Pixel art style. {CAT}"
    return nodes


def flux() -> Nodes:
    """FLUX.1-dev, text to image."""
    return {
        "model": loader(
            "flux1-dev.safetensors", "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"
        ),
        "clip": FLUX_CLIP,
        "vae": FLUX_VAE,
        "positive": prompt(CAT),
        "negative": no_negative(),
        "latent": empty_latent(1024),
        "guidance": Node(
            "FluxGuidance", "sample", {"guidance": 3.5}, {"conditioning": ("positive", 0)}
        ),
        "sampler": sampler("model", "guidance", "latent", steps=20, cfg=1.0, sampler_name="euler"),
        **picture("flux"),
    }


def flux_lora() -> Nodes:
    """FLUX.1-dev with a LoRA that makes do with 8 steps."""
    nodes = flux()
    url = "alimama-creative/FLUX.1-Turbo-Alpha/resolve/main/diffusion_pytorch_model.safetensors"
    nodes["lora"] = lora("FLUX.1-Turbo-Alpha.safetensors", url)
    nodes["sampler"].links["model"] = ("lora", 0)
    nodes["sampler"].widgets["steps"] = 8
    return nodes


def flux_edit() -> Nodes:
    """FLUX.1-Kontext-dev, image edit."""
    name = "flux1-dev-kontext_fp8_scaled.safetensors"
    base = "Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models"
    nodes = flux() | {"model": loader(name, f"{base}/{name}")}
    nodes["positive"].widgets["text"] = EDIT
    nodes["guidance"].widgets["guidance"] = 2.5
    nodes["guidance"].links["conditioning"] = ("referring", 0)
    del nodes["latent"]
    nodes |= input_picture()
    nodes["latent"] = Node(
        "VAEEncode", "condition", links={"pixels": ("scaled", 0), "vae": ("vae", 0)}
    )
    links: dict[str, Link] = {"conditioning": ("positive", 0), "latent": ("latent", 0)}
    nodes["referring"] = Node("ReferenceLatent", "condition", links=links)
    return nodes


def flux2() -> Nodes:
    """FLUX.2-dev, text to image: ComfyUI's own template, without its pictures."""
    base = "Comfy-Org/flux2-dev/resolve/main/split_files"
    model_name, encoder, vae_name = (
        f"{name}.safetensors"
        for name in ("flux2_dev_fp8mixed", "mistral_3_small_flux2_fp8", "flux2-vae")
    )
    size = {"width": 1024, "height": 1024}
    return {
        "model": loader(model_name, f"{base}/diffusion_models/{model_name}"),
        "clip": clip("flux2", (encoder, f"{base}/text_encoders/{encoder}")),
        "vae": vae(vae_name, f"{base}/vae/{vae_name}"),
        "positive": prompt(CAT),
        "latent": Node("EmptyFlux2LatentImage", "condition", {**size, "batch_size": 1}),
        "guidance": Node(
            "FluxGuidance", "condition", {"guidance": 4.0}, {"conditioning": ("positive", 0)}
        ),
        "guider": Node(
            "BasicGuider", "sample", links={"model": ("model", 0), "conditioning": ("guidance", 0)}
        ),
        "method": Node("KSamplerSelect", "sample", {"sampler_name": "euler"}),
        "schedule": Node("Flux2Scheduler", "sample", {"steps": 20, **size}),
        "noise": Node("RandomNoise", "sample", {"noise_seed": 42}),
        "sampler": Node(
            "SamplerCustomAdvanced",
            "sample",
            links={
                "noise": ("noise", 0),
                "guider": ("guider", 0),
                "sampler": ("method", 0),
                "sigmas": ("schedule", 0),
                "latent_image": ("latent", 0),
            },
        ),
        **picture("flux2"),
    }


def flux2_edit() -> Nodes:
    """FLUX.2-dev, image edit: up to ten pictures, each by a `ReferenceLatent` of its own."""
    nodes = flux2() | input_picture()
    nodes["positive"].widgets["text"] = EDIT
    nodes["encoded"] = Node(
        "VAEEncode", "condition", links={"pixels": ("scaled", 0), "vae": ("vae", 0)}
    )
    links: dict[str, Link] = {"conditioning": ("guidance", 0), "latent": ("encoded", 0)}
    nodes["referring"] = Node("ReferenceLatent", "condition", links=links)
    nodes["guider"].links["conditioning"] = ("referring", 0)
    return nodes


def qwen_image() -> Nodes:
    """Qwen-Image, text to image."""
    name = "qwen_image_fp8_e4m3fn.safetensors"
    return {
        "model": loader(name, f"{QWEN}/diffusion_models/{name}"),
        "clip": QWEN_CLIP,
        "vae": QWEN_VAE,
        "positive": prompt(SIGN),
        "negative": prompt(""),
        "latent": empty_latent(1328),
        "shifted": shift(3.1, "model"),
        "sampler": sampler(
            "shifted", "positive", "latent", steps=20, cfg=2.5, sampler_name="euler"
        ),
        **picture("qwen-image"),
    }


def qwen_image_lora() -> Nodes:
    """Qwen-Image with a LoRA that makes do with 8 steps and no guidance."""
    nodes = qwen_image()
    name = "Qwen-Image-Lightning-8steps-V1.0.safetensors"
    nodes["lora"] = lora(name, f"lightx2v/Qwen-Image-Lightning/resolve/main/{name}")
    nodes["shifted"].links["model"] = ("lora", 0)
    nodes["sampler"].widgets |= {"steps": 8, "cfg": 1.0}
    return nodes


def qwen_image_edit() -> Nodes:
    """Qwen-Image-Edit-2509, image edit."""
    name = "qwen_image_edit_2509_fp8_e4m3fn.safetensors"
    base = "Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models"
    nodes = qwen_image() | {"model": loader(name, f"{base}/{name}")} | input_picture()
    links: dict[str, Link] = {"clip": ("clip", 0), "vae": ("vae", 0), "image1": ("scaled", 0)}
    for key, text in (("positive", EDIT), ("negative", "")):
        nodes[key] = Node(
            "TextEncodeQwenImageEditPlus", "condition", {"prompt": text}, links, size=(400, 160)
        )
    nodes["latent"] = Node(
        "VAEEncode", "condition", links={"pixels": ("scaled", 0), "vae": ("vae", 0)}
    )
    return nodes


def input_picture() -> Nodes:
    """A picture of ComfyUI's input folder, brought to about a megapixel."""
    widgets = {"upscale_method": "lanczos", "megapixels": 1.0}
    return {
        "image": Node("LoadImage", "load", {"image": "example.png"}, size=(340, 320)),
        "scaled": Node("ImageScaleToTotalPixels", "condition", widgets, {"image": ("image", 0)}),
    }


TEMPLATES = {
    "Z-Image-Turbo - text to image": z_image,
    "Z-Image-Turbo - with a LoRA": z_image_lora,
    "FLUX.1 dev - text to image": flux,
    "FLUX.1 dev - with a LoRA": flux_lora,
    "FLUX.1 Kontext - edit a picture": flux_edit,
    "FLUX.2 dev - text to image": flux2,
    "FLUX.2 dev - edit a picture": flux2_edit,
    "Qwen-Image - text to image": qwen_image,
    "Qwen-Image - with a LoRA": qwen_image_lora,
    "Qwen-Image-Edit - edit a picture": qwen_image_edit,
}


# --- building ----------------------------------------------------------------------------------

_BUILD = """({nodes, gap}) => {
    const graph = app.graph;
    graph.clear();
    const made = {}, bottom = {};
    for (const [key, spec] of Object.entries(nodes)) {
        const node = LiteGraph.createNode(spec.type);
        made[key] = node;
        graph.add(node);
        if (spec.models.length) node.properties.models = spec.models;
        for (const [name, value] of Object.entries(spec.widgets))
            node.widgets.find((widget) => widget.name === name || !name).value = value;
        const [width, height] = spec.size ?? [0, 0], [least, lowest] = node.computeSize();
        node.setSize([Math.max(width, least), Math.max(height, lowest)]);
        node.pos = [spec.x, bottom[spec.x] ?? 0];
        bottom[spec.x] = node.pos[1] + node.size[1] + gap;
    }
    for (const [key, spec] of Object.entries(nodes))
        for (const [name, [source, slot]] of Object.entries(spec.links))
            made[source].connect(slot, made[key], name);
}"""


def build(page: ComfyPage, title: str) -> dict[str, Any]:
    """The workflow in the page's format; it is open in the page afterwards."""
    nodes = TEMPLATES[title]()
    has_ours = any(one.type == "TPSampler" for one in nodes.values())
    of_sampler = ", or on TP Sampler for that one" if has_ours else ""
    nodes["note"] = note(NOTE.format(title=title, of_sampler=of_sampler))
    specs = {key: {**vars(node), "x": COLUMNS[node.column]} for key, node in nodes.items()}
    page.page.evaluate(_BUILD, {"nodes": specs, "gap": GAP})
    page.page.wait_for_timeout(300)  # what the nodes ask the server for
    workflow = json.loads(page.page.evaluate("() => JSON.stringify(app.graph.serialize())"))
    workflow["extra"] = {}
    return dict(workflow)


def titles(names: list[str]) -> Iterator[str]:
    """The titles of the templates asked for, or all."""
    for title in TEMPLATES:
        if not names or title in names:
            yield title


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these titles")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with ComfyServer() as server, chromium() as browser, comfy_page(browser, server) as page:
        page.open({"Comfy.Minimap.Visible": False})
        for title in titles(options.names):
            workflow = build(page, title)
            path = FOLDER / f"{title}.json"
            path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n")
            name, _, what = title.partition(" - ")
            card(name, what, "on several GPUs").save(FOLDER / f"{title}.jpg", quality=85)
            print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
