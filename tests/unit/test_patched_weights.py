"""A rank's weight that patches make larger: where it lies, which recorded evaluations read."""

import torch
from torch import nn

from tp_runtime.rank.patched_weights import PatchedWeights, StoredWeight
from tp_runtime.sharding.parts import Part
from tp_runtime.wire.protocol import PatchedWeight, TensorRef, WeightPatch

ROWS, COLUMNS = 6, 4
HELD = {columns: torch.ones(ROWS, columns) for columns in (8, 12)}


def widening(columns: int) -> dict[str, PatchedWeight]:
    """To so many columns, by a difference of ones (`HELD`)."""
    ones = TensorRef((ROWS, columns), "float32", -1, columns)
    patch = WeightPatch("diff", (ones, {"pad_weight": True}), 1.0)
    return {"stored": PatchedWeight(0, ((patch,),), shape=(ROWS, columns))}


def test_each_shape_has_a_place_of_its_own() -> None:
    """The same as before when it has that shape again; and new ones when those were given back."""
    linear = nn.Linear(COLUMNS, ROWS, bias=False).requires_grad_(False)
    in_file = linear.weight.data.clone()
    stored = {"stored": StoredWeight((ROWS, COLUMNS), torch.float32)}
    parts = [Part("weight", 0, 0, "stored", (0, ROWS))]
    weights = PatchedWeights(
        linear, stored, lambda _: parts, 0, 1, lambda values: values, torch.device("cpu")
    )

    def place(columns: int) -> int:
        """Of the weight, which is right in that shape."""
        weights.apply(widening(columns) if columns > COLUMNS else {}, HELD)
        added = in_file.new_zeros(ROWS, columns)
        added[:, :COLUMNS] = in_file
        assert torch.equal(linear.weight.data, added + float(columns > COLUMNS))
        assert linear(torch.ones(1, columns)).shape == (1, ROWS)
        return linear.weight.data_ptr()

    places = {columns: place(columns) for columns in (COLUMNS, 8, 12)}
    assert len(set(places.values())) == len(places)
    for columns in (8, COLUMNS, 12, 8, COLUMNS):
        assert place(columns) == places[columns]
    place(8)
    weights.drop_other_shapes()
    for columns in (COLUMNS, 12, COLUMNS):
        place(columns)


def test_what_is_held_with_its_inputs_scale_is_patched_before_it() -> None:
    """A weight that is held dequantised has in it what its linear multiplies the input by."""
    linear = nn.Linear(COLUMNS, ROWS, bias=False).requires_grad_(False)
    scale = torch.tensor([0.5, 2.0, 0.0, 3.0])
    before = linear.weight.data.clone()
    linear.weight.data *= scale
    held = linear.weight.data.clone()
    stored = {"stored": StoredWeight((ROWS, COLUMNS), torch.float32, input_scale=scale)}
    parts = [Part("weight", 0, 0, "stored", (0, ROWS))]
    weights = PatchedWeights(
        linear, stored, lambda _: parts, 0, 1, lambda values: values, torch.device("cpu")
    )
    patch = WeightPatch("diff", (TensorRef((ROWS, COLUMNS), "float32", -1, 1),), 0.5)
    weights.apply({"stored": PatchedWeight(0, ((patch,),))}, {1: torch.ones(ROWS, COLUMNS)})
    torch.testing.assert_close(linear.weight.data, (before + 0.5) * scale)
    weights.apply({}, {})
    assert torch.equal(linear.weight.data, held)
