"""ComfyUI's official templates, as the page sends them, made small and run on stock and on ours.

A template is what the package comfyui-workflow-templates-json has, or with an older ComfyUI
comfyui-workflow-templates-media-image, which has no list of them. It is what is installed, or the
folder that `COMFYUI_TEMPLATES` names. What cannot be had here is replaced: files by tiny ones
(`support.template_files`), sizes and steps by small ones, nodes that need another model by what
they are given (`PASSED_ON`). Each sampler's latent is kept, and what only leads to a picture is
left out.
"""

import copy
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from support.accuracy import relative_error
from support.comfy_history import PromptError
from support.comfy_server import ComfyServer
from support.paths import REPOSITORY
from support.template_files import PLAIN, is_int8, model_of, write_files_of
from support.workflows import Prompt, node, tp_loader

# Largest difference from the stock latents, relative to their standard deviation.
TOLERANCE = 1e-5
# Where cond and uncond may be a batch: in another process the CPU adds up in another order.
BATCH_TOLERANCE = 1e-4
# Relative error where products in int8 round their inputs: each rank scales its share of them by
# itself, and the models' random weights make several steps' differences large.
INT8_TOLERANCE = 0.2
RESULTS = REPOSITORY / "tests" / "data" / "official_templates.json"
# Template → why it is not run, where no node that is missing says so.
LEFT_OUT = {
    "video_wan2_1_infinitetalk": "it needs an audio encoder and a model patch, of which there are "
    "no tiny ones",
}
_LOADERS = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}
_OURS = ("TPLoadDiffusionModel", "TPLoadCheckpoint")
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
# Node that needs another model → the input that stands for what it makes.
PASSED_ON = {
    "TextGenerate": "prompt",
    "TextGenerateLTX2Prompt": "prompt",
    "ImageUpscaleWithModel": "image",
    "MoGeRender": "moge_geometry",
    "MoGeInference": "image",
    "SDPoseDrawKeypoints": "keypoints",
    "SDPoseKeypointExtractor": "image",
    "StyleModelApply": "conditioning",
    "SCAIL2ColoredMask": "driving_track_data",
    "SAM3_VideoTrack": "images",
}
# Name of a model patch → what stands for it of TPTestModelPatches: its output, and its inputs.
_MODEL_PATCHES: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "qwen_image": (0, {}),
    "uso": (1, {}),
    "Z-Image": (0, {"union_layers": 6}),
}
# Input of any node but a primitive → its small value. H3's lengths are 17 n + 5, LTX-2's 8 n + 1.
_SIDE, _LENGTH, _STEPS = 64, 9, 4
_SMALL: Mapping[str, Any] = {
    "width": _SIDE,
    "height": _SIDE,
    "target_width": _SIDE,
    "target_height": _SIDE,
    "longer_size": _SIDE,
    "largest_size": _SIDE,
    "longer_edge": _SIDE,
    "megapixels": 0.01,
    "length": _LENGTH,
    "frames_number": _LENGTH,
    "num_frames": _LENGTH,
    "amount": _LENGTH,
    "batch_size": 1,
    "steps": _STEPS,
}
_H3_LENGTH = 22


@dataclass(frozen=True)
class Template:
    """One of the templates that load a file of a supported family."""

    name: str
    files: tuple[str, ...]
    usage: int

    @property
    def workflow(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((_folder() / f"{self.name}.json").read_text())
        return found

    @property
    def is_refused(self) -> bool:
        """Whether it loads a variant of a model that is refused by its name."""
        return any((model := model_of(name)) and model.key for name in self.files)


@dataclass(frozen=True)
class Outcome:
    """What came of a template; `why`: it is refused, or left out."""

    result: Literal["equal", "refused", "left out"]
    why: str = ""


def _folder() -> Path:
    """Where the templates are.

    Raises:
        FileNotFoundError: they are not installed.
    """
    if given := os.environ.get("COMFYUI_TEMPLATES"):
        return Path(given)
    for package in ("json", "media_image"):
        spec = find_spec(f"comfyui_workflow_templates_{package}")
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / "templates"
    raise FileNotFoundError("comfyui-workflow-templates is not installed")


@cache
def templates() -> tuple[Template, ...]:
    """Those of a supported family, the most used first; none where they are not installed."""
    try:
        index = json.loads((_folder() / "index.json").read_text())
    except FileNotFoundError:
        return ()
    found = []
    for listed in (one for category in index for one in category["templates"]):
        path = _folder() / f"{listed['name']}.json"
        if path.exists() and (files := tuple(sorted(set(_files(json.loads(path.read_text())))))):
            found.append(Template(listed["name"], files, listed.get("usage") or 0))
    return tuple(sorted(found, key=lambda one: (-one.usage, one.name)))


def _files(workflow: Mapping[str, Any]) -> Iterator[str]:
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", ())]
    for item in (item for graph in graphs for item in graph["nodes"]):
        values = item.get("widgets_values")
        name = values[0] if isinstance(values, list) and values else None
        if item["type"] in _LOADERS and isinstance(name, str) and model_of(name):
            yield name


# --- what is run ----------------------------------------------------------------------------------


def small(prompt: Prompt) -> Prompt:
    """The prompt of small sizes that keeps every latent of a model of ours, and its own nodes."""
    found = copy.deepcopy(prompt)
    for item in found.values():
        item.pop("_meta", None)
        _shrink(item)
    for node_id, item in list(found.items()):
        if (name := PASSED_ON.get(item["class_type"])) is not None:
            _pass_on(found, node_id, item["inputs"].get(name, ""))
        if item["class_type"] == "ModelPatchLoader":
            name = item["inputs"]["name"]
            output, inputs = next(of for part, of in _MODEL_PATCHES.items() if part in name)
            found["patches"] = node("TPTestModelPatches", **inputs)
            _pass_on(found, node_id, ["patches", output])
        if item["class_type"] == "SAM3_Detect":
            found[node_id] = node("SolidMask", value=1.0, width=_SIDE, height=_SIDE)
        if item["class_type"] == "LTXVLatentUpsampler":
            inputs = {"samples": item["inputs"]["samples"], "scale_by": 2.0}
            found[node_id] = node("LatentUpscaleBy", upscale_method="nearest-exact", **inputs)
    kept = []
    for node_id, item in list(found.items()):
        if item["class_type"] not in _SAMPLERS:
            continue
        if _loads_ours(found, node_id):
            kept.append(node_id)
        else:
            _pass_on(found, node_id, item["inputs"]["latent_image"])
    for node_id in kept:
        name = node_id.replace(":", "_")
        found[f"kept {name}"] = node("TPTestKeepLatent", samples=[node_id, 0], name=name)
    needed: dict[str, Any] = {}
    open_ends = [f"kept {node_id.replace(':', '_')}" for node_id in kept]
    while open_ends:
        node_id = open_ends.pop()
        if node_id not in needed:
            needed[node_id] = found[node_id]
            open_ends += [link[0] for link in _links(found[node_id])]
    return needed


def loaders(stock: Prompt) -> Prompt:
    """Loaders of ours alone: with them a model is tried that is refused by its name."""
    found = {
        node_id: tp_loader(item["inputs"]["unet_name"], 2)
        for node_id, item in stock.items()
        if item["class_type"] == "UNETLoader" and _loads_ours(stock, node_id)
    }
    ends = {f"{node_id} end": node("PreviewAny", source=[node_id, 0]) for node_id in found}
    return found | ends


def with_plain_weights(prompt: Prompt) -> Prompt:
    """The prompt with the int8 files' weights as they were before; the same prompt without any.

    Nor does ComfyUI round what it keeps of a model, which the ranks never do.
    """
    found = copy.deepcopy(prompt)
    for item in found.values():
        if item["class_type"] == "WanAnimate2Cache":
            item["inputs"]["dtype"] = "default"
        name = item["inputs"].get("unet_name")
        if isinstance(name, str) and is_int8(name):
            item["inputs"]["unet_name"] = f"{PLAIN}/{name}"
    return found


def switched(prompt: Prompt) -> Prompt:
    """The prompt with every switch the other way: LoRAs of few steps, text or a first frame, …"""
    found = copy.deepcopy(prompt)
    for item in found.values():
        if item["class_type"] == "PrimitiveBoolean":
            item["inputs"]["value"] = not item["inputs"]["value"]
    return found


def on_two_ranks(prompt: Prompt) -> Prompt:
    """The prompt with its loaders of ours by tensor parallelism on two ranks."""
    chosen = {"gpu_count": "2", "layout": "tp"}
    return {
        node_id: item | {"inputs": item["inputs"] | chosen} if item["class_type"] in _OURS else item
        for node_id, item in prompt.items()
    }


def _shrink(item: dict[str, Any]) -> None:
    kind, inputs = item["class_type"] or "", item["inputs"]
    if kind.startswith(("Primitive", "ComfyMath", "ComfySwitch")):
        return
    for name in inputs:
        value = _SMALL.get(name.rpartition(".")[2])
        if value is not None:
            inputs[name] = value
    if "MiniMaxH3" in kind and "length" in inputs:
        inputs["length"] = _H3_LENGTH
    if kind == "KSamplerAdvanced":  # the pair of Wan 2.2 and the like: half of the steps each
        first = inputs["start_at_step"] == 0
        inputs["start_at_step"] = 0 if first else _STEPS // 2
        last = isinstance(end := inputs["end_at_step"], int) and end >= 1000
        inputs["end_at_step"] = 10_000 if last or not first else _STEPS // 2
    if inputs.get("frame_idx", 0) not in (0, -1):
        inputs["frame_idx"] = _LENGTH // 2
    if kind == "SplitSigmas":
        inputs["step"] = _STEPS // 2


def _links(item: Mapping[str, Any]) -> list[list[Any]]:
    found = (value for value in item["inputs"].values())
    return [value for value in found if isinstance(value, list) and len(value) == 2]


def _pass_on(prompt: Prompt, node_id: str, value: Any) -> None:
    """Give what reads a node's outputs another value or link, and take the node out."""
    del prompt[node_id]
    for item in prompt.values():
        for name, link in item["inputs"].items():
            if isinstance(link, list) and len(link) == 2 and link[0] == node_id:
                item["inputs"][name] = value


def _loads_ours(prompt: Prompt, node_id: str) -> bool:
    """Whether the model that a sampler samples is of a file of a supported family."""
    inputs = prompt[node_id]["inputs"]
    for name in _LOADERS.values():
        if isinstance(file := inputs.get(name), str):
            return model_of(file) is not None
    links = (inputs.get(name) for name in ("model", "guider", "on_false", "on_true"))
    return any(_loads_ours(prompt, link[0]) for link in links if isinstance(link, list))


def outcome(server: ComfyServer, template: Template, stock: Prompt, ours: Prompt) -> Outcome:
    """Run what the page sends for a template, with ComfyUI's loaders and with ours.

    Raises:
        AssertionError: the latents differ.
        PromptError: the stock prompt fails, or ours with another error than one of this pack.
    """
    models, inputs = server.models, server.base / "input"
    if template.is_refused:
        prompt = loaders(stock)
        write_files_of(prompt, models, inputs)
        return _refused(server, prompt)
    stock, ours = small(stock), small(ours)
    for prompt in (stock, with_plain_weights(stock)):
        write_files_of(prompt, models, inputs)
    tolerance = BATCH_TOLERANCE if _is_guided(stock) else TOLERANCE
    expected = kept_latents(server, with_plain_weights(stock))
    try:
        found = kept_latents(server, on_two_ranks(with_plain_weights(ours)))
    except PromptError as error:
        return _of_error(error)
    _assert_equal(found, expected, tolerance)
    if switched(stock) != stock:
        expected = kept_latents(server, with_plain_weights(switched(stock)))
        found = kept_latents(server, on_two_ranks(with_plain_weights(switched(ours))))
        _assert_equal(found, expected, BATCH_TOLERANCE)
    if with_plain_weights(stock) != stock:
        expected = kept_latents(server, stock)
        found = kept_latents(server, on_two_ranks(ours))
        for name, latent in expected.items():
            error = relative_error(found[name], latent)
            print(f"{name}: {error:.1e} in int8")
            assert error <= INT8_TOLERANCE, name
    return Outcome("equal")


def _refused(server: ComfyServer, prompt: Prompt) -> Outcome:
    try:
        server.run(prompt)
    except PromptError as error:
        return _of_error(error)
    raise AssertionError("it is not refused any more")


def _of_error(error: PromptError) -> Outcome:
    """What ComfyUI shows of an error of the pack: its first sentence, without paths of this run."""
    if not error.type.startswith("tp_runtime."):
        raise error
    said = re.sub(r" \(/[^)]*\)", "", error.message.strip())
    return Outcome("refused", said.partition(". ")[0].rstrip("."))


def _is_guided(prompt: Prompt) -> bool:
    scales = (item["inputs"].get("cfg", 1) for item in prompt.values())
    return any(scale != 1 for scale in scales)


def _assert_equal(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, latent in expected.items():
        assert latent.isfinite().all(), name
        assert latent.std() > 0.1, name
        assert found[name].shape == latent.shape
        difference = float((found[name] - latent).abs().max() / latent.std())
        print(f"{name}: {difference:.1e}")
        assert math.isfinite(difference), name
        assert difference <= tolerance, name


# --- what came of it ------------------------------------------------------------------------------


def recorded() -> dict[str, dict[str, Any]]:
    """Template → its `files` and the fields of its `Outcome`, as they were when last written."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    return found


def record(outcomes: Mapping[str, Outcome]) -> None:
    """Write what came of these templates; those that no longer exist are forgotten."""
    before = recorded() if RESULTS.exists() else {}
    of_all = {}
    for template in templates():
        if (came := outcomes.get(template.name)) is not None:
            of_all[template.name] = {"files": template.files, **asdict(came)}
        elif template.name in before:
            of_all[template.name] = before[template.name]
    RESULTS.write_text(json.dumps(of_all, indent=1, ensure_ascii=False) + "\n")


def kept_latents(server: ComfyServer, prompt: Prompt) -> dict[str, torch.Tensor]:
    """Run a prompt of `small`: the tensors of each latent that it keeps, by their names.

    Raises:
        PromptError: of ComfyUI.
    """
    server.run(prompt)
    found = {}
    for item in prompt.values():
        if item["class_type"] == "TPTestKeepLatent":
            path = server.base / "output" / f"{item['inputs']['name']}.safetensors"
            for part, tensor in load_file(path).items():
                found[f"{item['inputs']['name']}/{part}"] = tensor
            path.unlink()
    return found
