"""What a rank lets go of when a model forgets what was computed and recorded."""

import gc
import weakref
from types import SimpleNamespace

import torch
from torch import nn

from tp_runtime.models.forward import Memo
from tp_runtime.rank.loaded_model import LoadedModel


def test_a_model_patch_that_is_gone_is_not_kept_by_the_model_that_used_it() -> None:
    """It would stay on the GPU for as long as the model: nothing moves it any more."""
    forward = SimpleNamespace(model=nn.Linear(4, 4), model_patches={})
    weights = SimpleNamespace(drop_other_shapes=lambda: None)
    model = LoadedModel(forward, weights, torch.device("cpu"), lambda: None, Memo, 0)  # type: ignore[arg-type]
    patch = nn.Linear(4, 4)
    forward.model_patches = {"control": patch}
    alive = weakref.ref(patch)
    del patch
    model.forget()
    gc.collect()
    assert alive() is None
