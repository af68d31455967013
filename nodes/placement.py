"""What a person asks in a loader about where its model runs."""

from dataclasses import dataclass

from ..tp_runtime.client import PRECISIONS, WHERE, Precision

AUTO = "auto"
HERE = WHERE[0]
EXACT = PRECISIONS[0]


@dataclass(frozen=True)
class Placement:
    """The inputs of that name, as they are written; which group they mean is `choose_group`'s.

    `devices`: the GPUs that the model may be on, such as "0,2,3"; empty: what the settings allow.
    """

    gpu_count: str = AUTO
    devices: str = ""
    layout: str = AUTO
    where: str = HERE
    precision: Precision = EXACT
