"""The tensors of requests, on the engine's side."""

import msgspec
import psutil
import pytest
import torch

from tp_runtime.client.tensor_sender import Asked, TensorSender
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


def test_a_patched_weight_arrives_as_it_is() -> None:
    """All that says how it is rounded; only its factors become references."""
    sender, factor = TensorSender(), torch.ones(10)
    (stages,) = (weight.stages for weight in patched_by(factor).values())
    weight = PatchedWeight(7, stages, by_bytes=True, keeps_scale=True)
    sender.hold(1, [factor])
    sent = sender.patch(2, "model", {"a": weight}).weights["a"]
    ((patch,),) = sent.stages
    assert patch.factors[0] is not factor
    assert msgspec.structs.replace(sent, stages=stages) == weight


def test_an_evaluation_has_a_result_for_each_latent() -> None:
    """Of a video and of its sound: in the dtype of each, at places of their own."""
    video, sound = torch.ones(1, 4, 2, 3, 3), torch.ones(1, 8, 2, 5, dtype=torch.bfloat16)
    inputs = {"x": [video, sound], "timesteps": torch.ones(1), "context": torch.ones(1, 2, 3)}
    shapes = (1, 4, 2, 3, 3), (1, 8, 2, 5)
    sender = TensorSender()
    asked = [Asked(inputs, shapes), Asked(inputs | {"x": sound}, shapes[1:])]
    request, places, *_ = sender.place_evaluations(1, "model", asked)
    refs = [[(ref.shape, ref.dtype) for ref in one.results] for one in request.evaluations]
    of_sound = (shapes[1], "bfloat16")
    assert refs == [[(shapes[0], "float32"), of_sound], [of_sound]]
    assert [[one.shape for one in of_one] for of_one in places] == [list(shapes), [shapes[1]]]
    for value, place in enumerate(one for of_one in places for one in of_one):
        place.fill_(value)
    assert [one.unique().tolist() for of_one in places for one in of_one] == [[0], [1], [2]]


def test_a_tensor_that_many_blocks_are_given_goes_once() -> None:
    """As a ControlNet of five blocks gives for sixty: the same ones, again and again."""
    sender, size = TensorSender(), 2**20
    residuals = [torch.full((1, size // 4), float(index)) for index in range(2)]
    inputs = {"x": torch.ones(1, 4, 8, 8), "control": {"input": [*residuals] * 30}}
    asked = Asked(inputs, ((1, 4, 8, 8),))
    request, *_ = sender.place_evaluations(1, "model", [asked])
    assert 2 * size <= request.exchange_bytes < 3 * size
    sent = request.evaluations[0].inputs["control"]["input"]
    assert sent == [*sent[:2]] * 30
    assert sent[0] != sent[1]
