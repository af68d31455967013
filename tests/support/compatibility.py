"""How a workflow that uses a stock node is built, and what is expected of it on our MODEL.

`support.compatibility_rows` lists the workflows; `tests/comfy/test_compatibility.py` runs each on
the stock model and on ours; `docs/compatibility.md` shows the list as a table (`table`).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from support.newer import is_newer
from support.paths import comfyui_path
from support.tiny_controlnets import CONTROLNETS
from support.tiny_models import write_tiny
from support.tiny_vae import FLUX2_VAE_NAME, VAE_NAME, WAN_VAE_NAME
from support.workflows import Prompt, Sampling, node, stock_twin, text_to_latent, tp_loader
from tp_runtime import models

PICTURE = "picture.png"


# Whether the ComfyUI that is tested has the nodes of newer releases (0.33) than 0.3.75.
NEWER = (comfyui_path() / "comfy_extras" / "nodes_nag.py").is_file()
SMALL = Sampling(steps=3, width=64, height=64)


@dataclass(frozen=True)
class Family:
    """One of the families of models, as tiny files."""

    name: str
    label: str
    vae: str
    empty_latent: str  # the node for it
    latent_shape: tuple[int, ...]
    pooled_width: int

    @classmethod
    def of(cls, family: models.Family) -> "Family":
        """What follows from its small sizes."""
        sizes = family.small
        geometry, pooled = sizes.geometry, sizes.inputs.get("y")
        of_flux2 = geometry.channels == 128
        picture_vae = FLUX2_VAE_NAME if of_flux2 else VAE_NAME
        return cls(
            family.name,
            family.label,
            WAN_VAE_NAME if geometry.video else picture_vae,
            "EmptyFlux2LatentImage" if of_flux2 else "EmptySD3LatentImage",
            geometry.latent_shape(64, 64),
            pooled.axes[-1].length if pooled else 0,
        )

    @property
    def file(self) -> str:
        return f"compatibility_{self.name}.safetensors"

    @property
    def latent(self) -> str:
        """What LoadLatent reads: a random latent of `latent_shape`."""
        return f"{self.name}.latent"

    def write(self, path: Path) -> Path:
        """Write the family's tiny file."""
        return write_tiny(self.name, path)

    @property
    def write_controlnet(self) -> Callable[[Path], Path] | None:
        """Writes a tiny ControlNet for it; None: ComfyUI has none."""
        return CONTROLNETS.get(self.name)


# Those of 0.3.75: nothing can be expected there of a family that only newer releases know.
FAMILIES = tuple(
    Family.of(family) for name, family in models.families().items() if not is_newer(name)
)

# --- what is expected ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Same:
    """Every latent of the workflow is the stock model's."""

    cell: str = "✓"


@dataclass(frozen=True)
class NoEffect(Same):
    """The same; and the stock model does not look at what the node sets."""

    cell: str = "✓ (no effect)"


@dataclass(frozen=True)
class Refused:
    """Ours ends at `node` with an error that contains every one of `words`.

    The stock workflow works; it is not run if `in_stock` is false (training needs real captions).
    """

    node: str
    words: tuple[str, ...]
    in_stock: bool = True
    cell: str = "clear error"


@dataclass(frozen=True)
class FailsInStock:
    """The stock workflow ends with an error at `node`, and so does ours."""

    node: str
    cell: str = "– (fails in ComfyUI)"


Expectation = Same | Refused | FailsInStock
Expected = Expectation | Mapping[str, Expectation]
Edit = Callable[[Prompt, Family], object]  # changes the prompt in place


def unchanged(prompt: Prompt, family: Family) -> None:
    """The edit that leaves a prompt as it is."""


@dataclass(frozen=True)
class Row:
    """A line of the table: a workflow, made from caption and empty latent by `edit`.

    `title` names the nodes as ComfyUI's class names, in backquotes. `batched`: the model evaluates
    a batch, for which the CPU adds up in another order in another process. `without`: a node that
    the stock workflow leaves out. `newer`: what is expected on newer releases (NEWER) where that is
    something else; with nothing in `expect`, the nodes are only there.
    """

    title: str
    edit: Edit = unchanged
    sampling: Sampling = SMALL
    sampler: Literal["KSampler", "TPSampler", "SamplerCustomAdvanced"] = "KSampler"
    batched: bool = False
    expect: Expected = Same()
    newer: Expected | None = None
    without: str | None = None

    @property
    def name(self) -> str:
        """The title as a word of a test's id."""
        return re.sub(r"[^\w.]+", "-", self.title).strip("-")[:60]

    def expected(self, family: Family, newer: bool = False) -> Expectation | None:
        """What is expected on this model; None: the workflow is not for it."""
        found = _of_family(self.newer, family) if newer else None
        return found or _of_family(self.expect, family)

    def prompt(self, family: Family) -> Prompt:
        """The workflow on our MODEL."""
        prompt = text_to_latent(tp_loader(family.file, 2), self.sampler, self.sampling)
        for side, length in (("positive", 12), ("negative", 20)):
            prompt[side]["inputs"] |= {"length": length, "pooled_width": family.pooled_width}
        self.edit(prompt, family)
        return prompt

    def stock_prompt(self, prompt: Prompt) -> Prompt:
        """The workflow of `prompt` on the stock model."""
        twin = stock_twin(prompt)
        for name in [name for name, item in twin.items() if item["class_type"] == self.without]:
            before = twin.pop(name)["inputs"]["model"]
            _relink(twin, [name, 0], before)
        return twin


def _of_family(expected: Expected | None, family: Family) -> Expectation | None:
    return expected.get(family.name) if isinstance(expected, Mapping) else expected


# --- edits ---------------------------------------------------------------------------------------


def insert(prompt: Prompt, after: str, class_type: str, socket: str, **inputs: Any) -> str:
    """Put a node on the first output of the node `after`; it takes that at its input `socket`."""
    name = f"{class_type} after {after}"
    while name in prompt:
        name += "'"
    _relink(prompt, [after, 0], [name, 0])
    prompt[name] = node(class_type, **{socket: [after, 0]}, **inputs)
    return name


def _relink(prompt: Prompt, old: list[Any], new: list[Any]) -> None:
    for item in prompt.values():
        for key, value in item["inputs"].items():
            if value == old:
                item["inputs"][key] = new


def on_model(class_type: str, **inputs: Any) -> Edit:
    """A node between the loader and all that uses the model."""
    return lambda prompt, _: insert(prompt, "model", class_type, "model", **inputs)


def on_positive(class_type: str, socket: str = "conditioning", **inputs: Any) -> Edit:
    """A node between the positive conditioning and what uses it."""
    return lambda prompt, _: insert(prompt, "positive", class_type, socket, **inputs)


def on_latent(class_type: str, socket: str = "samples", **inputs: Any) -> Edit:
    """A node between the latent and the sampler."""
    return lambda prompt, _: insert(prompt, "latent", class_type, socket, **inputs)


def beside(**nodes: dict[str, Any]) -> Edit:
    """More nodes, or others in the place of those of the same name."""
    return lambda prompt, _: prompt.update(nodes)


def given(node_id: str, **inputs: Any) -> Edit:
    """Other inputs of a node."""
    return lambda prompt, _: prompt[node_id]["inputs"].update(inputs)


def from_picture(prompt: Prompt, family: Family) -> None:
    """Sampling starts from a random latent instead of an empty one."""
    prompt["latent"] = node("LoadLatent", latent=family.latent)


def with_pictures(prompt: Prompt, family: Family) -> None:
    """A picture, a soft mask made of it, and the VAE, for other nodes to take."""
    prompt |= {
        "picture": node("LoadImage", image=PICTURE),
        "mask": node("LoadImageMask", image=PICTURE, channel="red"),
        "vae": node("VAELoader", vae_name=family.vae),
    }


def all_of(*edits: Edit) -> Edit:
    """One edit after another."""

    def edit(prompt: Prompt, family: Family) -> None:
        for each in edits:
            each(prompt, family)

    return edit


def share(values: Iterable[str], family: Family) -> list[str]:
    """The model's share of them: each is tested with one of the models."""
    return list(values)[FAMILIES.index(family) :: len(FAMILIES)]


def each_value(name: str, values: Sequence[str]) -> Edit:
    """A KSampler and a SaveLatent for each value of an input that is the model's share."""

    def edit(prompt: Prompt, family: Family) -> None:
        sampler = prompt.pop("sampler")
        del prompt["save"]
        for value in share(values, family):
            prompt[value] = node(sampler["class_type"], **sampler["inputs"] | {name: value})
            prompt[f"save {value}"] = node(
                "SaveLatent", samples=[value, 0], filename_prefix=f"latents/{value}"
            )

    return edit


def with_defaults(prompt: Prompt, node_info: Mapping[str, Any]) -> Prompt:
    """The prompt with every required input that it leaves out, as a node on the page has it."""
    for item in prompt.values():
        required = node_info[item["class_type"]]["input"].get("required", {})
        for name, (kind, *options) in required.items():
            if name not in item["inputs"]:
                item["inputs"][name] = _default(kind, options[0] if options else {})
    return prompt


def _default(kind: str | list[Any], options: Mapping[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    if kind == "BOOLEAN":
        return False
    return (options["options"] if kind == "COMBO" else kind)[0]
