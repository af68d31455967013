"""The block-wise ControlNet of DiffSynth for Qwen-Image: ComfyUI's ``QwenImageBlockWiseControlNet``
(0.3.75, comfy_extras/nodes_model_patch.py), less what it does before sampling.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..dual_stream import NORM_EPS
from ..layers import project, rms_norm
from .model_patch import BlockWiseControl


def build(sizes: BlockWiseControl) -> "BlockWiseControlNet":
    """The module of that size."""
    return BlockWiseControlNet(sizes.dim, sizes.num_blocks)


class _Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.x_rms, self.y_rms = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.input_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)


class BlockWiseControlNet(nn.Module):
    """For each block of the model, what is added to the image's tokens after it."""

    def __init__(self, dim: int, num_blocks: int) -> None:
        super().__init__()
        blocks: Sequence[nn.Module] = [_Block(dim) for _ in range(num_blocks)]
        self.controlnet_blocks = nn.ModuleList(blocks)

    def residual(self, index: int, tokens: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        """After block ``index``: tokens (B, L, D), hint (B or 1, L, D) → (B, L, D)."""
        block: Any = self.controlnet_blocks[index]
        normed = rms_norm(tokens, block.x_rms.weight, NORM_EPS)
        both = normed + rms_norm(hint, block.y_rms.weight, NORM_EPS)
        found: torch.Tensor = block.output_proj(F.gelu(project(block.input_proj, both)))
        return found
