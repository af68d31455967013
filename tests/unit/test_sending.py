"""The tensors of requests, on the engine's side."""

import psutil
import pytest
import torch

from tp_runtime.client.tensor_sender import TensorSender
from tp_runtime.errors import InputError, TPRuntimeError
from tp_runtime.wire.protocol import PatchedWeight, WeightPatch


def patched_by(*factors: torch.Tensor) -> dict[str, PatchedWeight]:
    patch = WeightPatch("lora", tuple(factors), 1.0)
    return {"a": PatchedWeight(0, ((patch,),))}


def test_factors_that_could_not_be_sent_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the ranks would be told to use, or to drop, what they never got."""
    sender = TensorSender()
    good, bad = torch.ones(1000), torch.ones(3, dtype=torch.complex64)
    with pytest.raises(InputError, match="complex64"):
        sender.hold(1, [good, bad])
    (portion,) = sender.not_held(patched_by(good))
    assert portion == [good]

    memory = psutil.virtual_memory()
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=0))
        with pytest.raises(TPRuntimeError, match="shared memory"):
            sender.hold(2, portion)
    assert [*sender.not_held(patched_by(good))] == [[good]]
    assert sender.patch(3, "model", {}).drop == []

    sender.hold(4, portion)
    assert not [*sender.not_held(patched_by(good))]
