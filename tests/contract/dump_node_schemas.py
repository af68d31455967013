"""Prints, as JSON, the pack's nodes as ComfyUI reads them, for test_node_schemas.py.

    python tests/contract/dump_node_schemas.py COMFYUI_ROOT [--write]

`--write` replaces the snapshot `node_schemas.json`, for a change that is meant, and the English
texts of the nodes in `locales/`, which the page translates by. A program of its
own, since the pack and ComfyUI both have a top-level module `nodes`. It loads the pack as ComfyUI
does: by its path.
"""

import argparse
import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("node_schemas.json")
ENGLISH = REPOSITORY / "locales/en/nodeDefs.json"

# What ComfyUI and a person's disk decide.
_FOLDERS = {"unet_name": "diffusion_models", "ckpt_name": "checkpoints"}
_SAMPLERS = "<ComfyUI's samplers>"
_SCHEDULERS = "<ComfyUI's schedulers>"
_NOT_FROZEN = ("tooltip", "display_name")


def main() -> None:
    """Print what is frozen (`nodes`), the texts, and the inputs of the stock KSampler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--write", action="store_true", help="replace node_schemas.json")
    options = parser.parse_args()
    sys.path[0] = str(options.comfyui)  # in place of this file's folder
    sys.argv = ["main.py"]
    from comfy.cli_args import args

    args.cpu = True
    nodes = asyncio.run(_nodes(_load_pack()))
    frozen = [_frozen(node) for node in nodes]
    if options.write:
        SNAPSHOT.write_text(json.dumps(frozen, indent=2, default=list) + "\n")
        ENGLISH.write_text(json.dumps(_locale(nodes), indent=2, ensure_ascii=False) + "\n")
    texts = [_texts(node) for node in nodes]
    found = {
        "nodes": frozen,
        "texts": texts,
        "locale": _locale(nodes),
        "ksampler": _stock_inputs("KSampler"),
    }
    json.dump(found, sys.stdout, default=list)


def _load_pack() -> ModuleType:
    name = str(REPOSITORY).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


async def _nodes(pack: ModuleType) -> list[Any]:
    extension = await pack.comfy_entrypoint()
    nodes: list[Any] = await extension.get_node_list()
    return nodes


def _frozen(node: Any) -> dict[str, Any]:
    schema = node.GET_SCHEMA()
    return {
        "node_id": schema.node_id,
        "display_name": schema.display_name,
        "is_output_node": schema.is_output_node,
        "inputs": [
            {"id": item.id, "type": str(item.get_io_type()), **_options(item.id, item.as_dict())}
            for item in schema.inputs
        ],
        "outputs": [{"id": item.id, "type": str(item.io_type)} for item in schema.outputs],
    }


def _texts(node: Any) -> dict[str, Any]:
    schema = node.GET_SCHEMA()
    return {
        "node_id": schema.node_id,
        "category": schema.category,
        "description": schema.description,
        "tooltips": {item.id: item.tooltip for item in (*schema.inputs, *schema.outputs)},
    }


def _locale(nodes: list[Any]) -> dict[str, Any]:
    """The nodes' texts as ComfyUI's `nodeDefs.json` has them."""
    texts = {}
    for node in nodes:
        schema = node.GET_SCHEMA()
        texts[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {item.id: {"tooltip": item.tooltip} for item in schema.inputs},
            "outputs": {
                str(index): {"tooltip": item.tooltip} for index, item in enumerate(schema.outputs)
            },
        }
    return texts


def _stock_inputs(name: str) -> list[dict[str, Any]]:
    import nodes  # ComfyUI's

    required = nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
    inputs = []
    for input_id, (kind, *rest) in required.items():
        options = dict(rest[0]) if rest else {}
        if isinstance(kind, list):
            kind, options = "COMBO", options | {"options": kind}
        inputs.append({"id": input_id, "type": kind, **_options(input_id, options)})
    return inputs


def _options(input_id: str, options: dict[str, Any]) -> dict[str, Any]:
    import comfy.samplers

    named = {
        _SAMPLERS: comfy.samplers.KSampler.SAMPLERS,
        _SCHEDULERS: comfy.samplers.KSampler.SCHEDULERS,
    }
    kept = {key: value for key, value in options.items() if key not in _NOT_FROZEN}
    for name in ("multiselect", "optional"):  # said only where true by some releases of ComfyUI
        if not kept.get(name, True):
            del kept[name]
    if input_id in _FOLDERS:
        kept["options"] = f"<files in {_FOLDERS[input_id]}>"
    elif "options" in kept:
        choices = list(kept["options"])
        kept["options"] = next((name for name, known in named.items() if known == choices), choices)
    return kept


if __name__ == "__main__":
    main()
