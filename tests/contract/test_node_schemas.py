"""Workflow files name our nodes and inputs: those must not change by accident."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def test_schemas_are_the_frozen_ones(dump: dict[str, Any]) -> None:
    """For a change that is meant: `dump_node_schemas.py --write`, and a line in CHANGELOG.md."""
    assert dump["nodes"] == json.loads((HERE / "node_schemas.json").read_text())


def test_every_node_and_socket_is_explained(dump: dict[str, Any]) -> None:
    for node in dump["texts"]:
        assert node["category"] == "tensor parallel"
        assert node["description"], node["node_id"]
        unexplained = [name for name, text in node["tooltips"].items() if not text]
        assert not unexplained, (node["node_id"], unexplained)


def test_tp_sampler_takes_what_ksampler_takes(dump: dict[str, Any]) -> None:
    """The same names in the same order, with the same defaults and ranges; then gpu_count."""
    (ours,) = [node for node in dump["nodes"] if node["node_id"] == "TPSampler"]
    *inputs, gpu_count = ours["inputs"]
    assert inputs == dump["ksampler"]
    assert gpu_count["id"] == "gpu_count"
