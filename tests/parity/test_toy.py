"""The trained toy on real ranks against ComfyUI's NextDiT, on the file and class of its pack."""

from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.native import import_comfy
from support.paths import TOY_PACK
from support.toy import MODEL

pytestmark = pytest.mark.process

PATH = TOY_PACK / "models" / "diffusion_models" / MODEL


@pytest.fixture(scope="module")
def native() -> Any:
    """ComfyUI's own model, computing in fp32."""
    import_comfy()
    import comfy.ops
    import comfy.sd
    from comfy import supported_models

    from examples.shapes.nodes import ShapesZImage

    options = {"dtype": torch.float32, "custom_operations": comfy.ops.disable_weight_init}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supported_models, "models", [ShapesZImage, *supported_models.models])
        return comfy.sd.load_diffusion_model(str(PATH), options).model.diffusion_model


@pytest.mark.parametrize("timestep", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_fp32(native: Any, remote: Remote, tp_size: int, timestep: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 16, 16, 16, generator=generator),
        "timesteps": torch.full((2,), timestep),
        "context": torch.randn(2, 5, 64, generator=generator),
        "num_tokens": 5,
        "transformer_options": {},
    }
    with torch.inference_mode():
        expected = native(**inputs)
    found = remote(PATH, tp_size).denoise(inputs)
    assert relative_error(found, expected) <= FP32_TOLERANCE
