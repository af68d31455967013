"""Several models in one sampler, ours and stock ones: each is evaluated as if it were alone.

A guider evaluates its second model with the options of the first, and so with its wrappers.
"""

from collections.abc import Callable

import pytest

from support.comfy_history import History
from support.workflows import Prompt, Sampling, node, stock_loader, text_to_latent, tp_loader

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"
SAMPLING = Sampling(cfg=2.0, steps=2)
LOADERS = {
    "stock": stock_loader(MODEL),
    "tp": tp_loader(MODEL, 2),
    "other group": tp_loader(MODEL, 3),
    "batch groups": tp_loader(MODEL, 2),
}
LOADERS["batch groups"]["inputs"]["layout"] = "1x2"
PAIRS = [
    ("tp", "stock"),
    ("stock", "tp"),
    ("tp", "tp"),
    ("tp", "other group"),
    ("batch groups", "stock"),
    ("batch groups", "tp"),
]

Compare = Callable[..., History]


def two_models(first: str, second: str) -> Prompt:
    prompt = text_to_latent(LOADERS[first], "SamplerCustomAdvanced", SAMPLING)
    prompt["second"] = LOADERS[second]
    prompt["guider"] = node(
        "TPTestTwoModels",
        model=["model", 0],
        negative_model=["second", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        cfg=SAMPLING.cfg,
    )
    return prompt


@pytest.mark.rotates(5)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_models(same_as_stock: Compare, first: str, second: str) -> None:
    same_as_stock(two_models(first, second))
