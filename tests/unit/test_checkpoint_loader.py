"""What ComfyUI's process reads of a full checkpoint whose model is on the ranks."""

from pathlib import Path

import torch

from support.full_checkpoints import MODEL_PREFIX
from support.memory import at_most
from support.pack import pack_module
from support.sparse_files import holes, write_sparse
from support.tiny_models import tiny_shapes
from tp_runtime.client import checkpoint_info

MB = 2**20


def test_the_weights_of_the_model_are_not_read(tmp_path: Path) -> None:
    """Of a file of 700 MB: `at_most` counts what is mapped and touched, too."""
    shapes = {
        MODEL_PREFIX + name: shape
        for name, shape in tiny_shapes("flux", num_heads=24, head_dim=128).items()
    }
    vae = {"vae.taesd_decoder.1.weight": torch.ones(64, 16, 3, 3)}
    path = write_sparse(tmp_path / "full.safetensors", holes(shapes, torch.bfloat16) | vae)
    assert path.stat().st_size > 700 * MB
    with pack_module("nodes.checkpoint_loader") as loader:
        info = checkpoint_info(str(path))
        loader.clip_and_vae(info)  # what is imported and kept
        with at_most(100 * MB):
            clip, found = loader.clip_and_vae(info)
    assert clip is None
    weight = found.first_stage_model.taesd_decoder[1].weight
    assert torch.equal(weight.float(), vae["vae.taesd_decoder.1.weight"])
