"""A diffusers folder on real ranks gives the numbers of the ComfyUI file it was made from."""

from pathlib import Path

import pytest
import torch
from parity.conftest import Remote
from parity.test_z_image import make_inputs

from support.diffusers_folders import FAMILIES, write_folder

pytestmark = pytest.mark.process


def test_z_image_gives_the_same_bits(tmp_path: Path, remote: Remote) -> None:
    file = FAMILIES["z_image"].write(tmp_path / "model.safetensors")
    folder = write_folder(file, tmp_path / "folder", "z_image", num_shards=2)
    inputs = make_inputs(1, 16, 16, 20)
    found, expected = (remote(path, 2).evaluate(inputs) for path in (folder, file))
    assert torch.equal(found, expected)
