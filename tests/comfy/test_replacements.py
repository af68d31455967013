"""ComfyUI's own replacing of nodes (0.33) knows which loaders ours stand for."""

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from support.comfy_server import ComfyServer
from support.pack import pack_module
from support.paths import comfyui_path

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(
        not (comfyui_path() / "app/node_replace_manager.py").exists(),
        reason="this ComfyUI replaces no nodes",
    ),
]

LOADERS = {"UNETLoader": "TPLoadDiffusionModel", "CheckpointLoaderSimple": "TPLoadCheckpoint"}


def test_comfyui_knows_them(comfy_server: ComfyServer) -> None:
    known = comfy_server.get("/node_replacements")
    nodes = comfy_server.get("/object_info")
    for stock, ours in LOADERS.items():
        (found,) = known[stock]
        assert found["new_node_id"] == ours
        inputs = nodes[stock]["input"]["required"]
        assert found["old_widget_ids"] == list(inputs)
        assert [each["old_id"] for each in found["input_mapping"]] == list(inputs)
        assert len(found["output_mapping"]) == len(nodes[stock]["output"])
        assert nodes[ours]["output"] == nodes[stock]["output"]


def test_a_prompt_whose_loaders_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's own code puts ours in their place, with what they were given and gave."""
    with pack_module("nodes.replacements") as replacements:
        nodes = SimpleNamespace(NODE_CLASS_MAPPINGS=dict.fromkeys(LOADERS.values()))
        monkeypatch.setitem(sys.modules, "nodes", nodes)
        monkeypatch.delitem(sys.modules, "app.node_replace_manager", raising=False)
        from app.node_replace_manager import NodeReplaceManager

        manager = NodeReplaceManager()
        instance = SimpleNamespace(node_replace_manager=manager)
        server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
        monkeypatch.setitem(sys.modules, "server", server)
        asyncio.run(replacements.register_replacements())
        prompt: dict[str, Any] = {
            "1": of("UNETLoader", unet_name="a.safetensors", weight_dtype="fp8_e4m3fn"),
            "2": of("CheckpointLoaderSimple", ckpt_name="b.safetensors"),
            "3": of("VAEDecode", samples=["1", 0], vae=["2", 2]),
        }
        manager.apply_replacements(prompt)
        found = {key: (each["class_type"], each["inputs"]) for key, each in prompt.items()}
    assert found == {
        "1": (
            "TPLoadDiffusionModel",
            {"unet_name": "a.safetensors", "weight_dtype": "fp8_e4m3fn"},
        ),
        "2": ("TPLoadCheckpoint", {"ckpt_name": "b.safetensors"}),
        "3": ("VAEDecode", {"samples": ["1", 0], "vae": ["2", 2]}),
    }


def of(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}
