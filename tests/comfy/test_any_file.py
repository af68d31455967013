"""Files with any names: the tensors that ComfyUI's own loader takes for the diffusion model's."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from support.fuzz import examples
from support.native import import_comfy
from tp_runtime.recognise import open_checkpoint

pytestmark = pytest.mark.comfy

PREFIXES = ("", "model.", "model.model.", "model.diffusion_model.", "net.", "vae.", "nets.")
names = st.builds(str.__add__, st.sampled_from(PREFIXES), st.sampled_from("abcdefghij"))


@examples(200)
@given(st.sets(names, min_size=1, max_size=30))
@example({f"net.{letter}" for letter in "abcdef"} | {"model.a"})  # six are enough
@example({f"net.{letter}" for letter in "abcde"} | {"model.a"})  # and five too few
@example({"model.model.a", "model.b"})
def test_any_names(tmp_path: Path, found: set[str]) -> None:
    import_comfy()
    import comfy.model_detection
    import comfy.utils

    tensors = {name: torch.zeros(1) for name in sorted(found)}
    path = tmp_path / "any.safetensors"
    save_file(tensors, path)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    own = comfy.utils.state_dict_prefix_replace(dict(tensors), {prefix: ""}, filter_keys=True)
    with open_checkpoint(str(path)) as file:
        assert file.tensors().keys() == (own or tensors).keys()
