"""The nodes "TP Runtime Info" and "TP Release Runtime"."""

import json
from typing import Any

import comfy.model_management
from comfy_api.latest import io, ui

from ..tp_runtime.client import GroupReport, get_runtime
from .notices import gibibytes, show_on_node
from .schema import tp_schema

_ANYTHING_TOOLTIP = (
    "Passed on as it is. Connect it to run this node at a certain place of the workflow, for "
    "instance after a sampler."
)


def _always_new() -> float:
    """A fingerprint that no earlier one equals: ComfyUI runs the node every time.

    A new object each time. ComfyUI compares fingerprints inside containers, where the same NaN
    object counts as equal to itself.
    """
    return float("nan")


class TPRuntimeInfo(io.ComfyNode):
    """Shows what the process groups are and hold."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return tp_schema(
            node_id="TPRuntimeInfo",
            display_name="TP Runtime Info",
            description=(
                "Reports the running process groups: the tensor-parallel size as every rank sees "
                "it, devices, memory, the models held and the time of the last step."
            ),
            search_aliases=["tensor parallel", "multi gpu", "gpu memory", "status"],
            inputs=[io.AnyType.Input("anything", optional=True, tooltip=_ANYTHING_TOOLTIP)],
            outputs=[
                io.AnyType.Output("passed", display_name="passed", tooltip="The input."),
                io.String.Output("report", display_name="report", tooltip="The report, as JSON."),
            ],
            is_output_node=True,
            not_idempotent=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return _always_new()

    @classmethod
    def execute(cls, anything: Any = None) -> io.NodeOutput:
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        reports = get_runtime().reports(poll=poll)
        text = json.dumps({"groups": [report.as_dict() for report in reports]}, indent=2)
        show_on_node(cls.hidden.unique_id, "\n".join(map(_summary, reports)) or "No group runs.")
        return io.NodeOutput(anything, text, ui=ui.PreviewText(text))


class TPReleaseRuntime(io.ComfyNode):
    """Ends the process groups and so frees all that they hold."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return tp_schema(
            node_id="TPReleaseRuntime",
            display_name="TP Release Runtime",
            description=(
                "Ends the process groups and frees their GPU memory. The next sampler starts "
                "them again."
            ),
            search_aliases=["tensor parallel", "multi gpu", "free memory", "unload", "vram"],
            inputs=[io.AnyType.Input("anything", optional=True, tooltip=_ANYTHING_TOOLTIP)],
            outputs=[io.AnyType.Output("passed", display_name="passed", tooltip="The input.")],
            is_output_node=True,
            not_idempotent=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return _always_new()

    @classmethod
    def execute(cls, anything: Any = None) -> io.NodeOutput:
        count = get_runtime().release()
        groups = "1 process group" if count == 1 else f"{count} process groups"
        text = f"Ended {groups}."
        show_on_node(cls.hidden.unique_id, text)
        return io.NodeOutput(anything, ui=ui.PreviewText(text))


def _summary(report: GroupReport) -> str:
    """A group in a few lines, for the node: the page shows no more of a node's result."""
    kind = "GPU" if report.device == "cuda" else "CPU process"
    num_ranks = report.layout.num_gpus
    plural = "" if num_ranks == 1 else "s" if kind == "GPU" else "es"
    groups = f" in {report.batch_groups} batch groups" if report.batch_groups > 1 else ""
    lines = [f"{num_ranks} {kind}{plural}{groups}: {report.error or report.state}"]
    for name, model in report.models.items():
        size = f"{gibibytes(max(model['bytes'] or [0]))} each"
        streamed = max(model["streamed"] or [0])
        more = f" + {gibibytes(streamed)} in the host's memory" if streamed else ""
        asleep = ", asleep" if model["asleep"] else ""
        rounds = any(
            rank["models"].get(name, {}).get("precision") == "fast" for rank in report.ranks
        )
        bits = ", 8 bits between the GPUs" if rounds else ""
        lines.append(f"{name.partition('@')[0]}: {size}{more}{asleep}{bits}")
    if report.step_ms is not None:
        lines.append(f"{report.step_ms:.0f} ms per step")
    return "\n".join(lines)
