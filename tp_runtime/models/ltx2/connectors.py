"""LTX-2's connectors: what makes a caption ready, once a generation.

ComfyUI's ``LTXAVModel.preprocess_text_embeds`` (0.33, comfy/ldm/lightricks/av_model.py and
embeddings_connector.py). Shapes: B batch, L tokens, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...gpu.epilogue import Epilogue
from ...sharding.plan import Split
from ..layers import gelu_mlp
from .blocks import NORM, StreamsForward, at_itself
from .family import MIN_CAPTION, LTX2Sizes
from .layers import EPS, Heads, rotation_of
from .rows import REGISTERS

CAPTION_POSITIONS = 4096


class ConnectorsForward(StreamsForward):
    """A forward whose module has connectors, if its file does."""

    sizes: LTX2Sizes

    @classmethod
    def build(cls, sizes: LTX2Sizes) -> nn.Module:  # type: ignore[override]
        """diffusers' module, with the connectors."""
        module = super().build(sizes)
        if sizes.connector_blocks:
            from diffusers.pipelines.ltx2.connectors import LTX2ConnectorTransformer1d

            for which, heads, head_dim in sizes.connectors:
                connector = LTX2ConnectorTransformer1d(
                    heads,
                    head_dim,
                    sizes.connector_blocks,
                    REGISTERS,
                    gated_attention=sizes.connector_gated,
                )
                setattr(module, f"{which}_embeddings_connector", connector)
        return module

    def connect(self, caption: torch.Tensor) -> torch.Tensor:
        """ComfyUI's ``preprocess_text_embeds`` of what the text encoder gives (B, L, width).

        Side by side for video and for sound (B, L', sum of ``caption_dims``), at least 1024 tokens.
        """
        sizes = self.sizes
        both = sizes.dim, sizes.audio_dim
        captions = caption.split(both, dim=-1) if caption.shape[-1] == sum(both) else 2 * (caption,)
        found = []
        for (which, heads, head_dim), given in zip(sizes.connectors, captions, strict=True):
            connector = getattr(self.model, f"{which}_embeddings_connector")
            found.append(self._connected(connector, given, heads, head_dim))
        return torch.cat(found, dim=-1)

    def _connected(
        self, connector: Any, caption: torch.Tensor, num_heads: int, head_dim: int
    ) -> torch.Tensor:
        """A caption, filled up with learned tokens, through a connector: (B, L, D) → (B, L', D)."""
        count = -(-max(MIN_CAPTION, caption.shape[1]) // REGISTERS)
        registers = connector.learnable_registers.tile(count, 1)[caption.shape[1] :]
        tokens = torch.cat((caption, registers.to(caption).expand(len(caption), -1, -1)), dim=1)
        places = torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        heads = self.heads(num_heads, head_dim)
        given = places[None, None], (CAPTION_POSITIONS,), heads, "float64", tokens.dtype
        rotation = rotation_of(*given)
        normed = F.rms_norm(tokens, tokens.shape[-1:], eps=EPS)
        for block in connector.transformer_blocks:
            look = at_itself(block.attn1, num_heads * head_dim, head_dim, normed, rotation)
            (product,) = self.attend([look])
            tokens, normed = self.join([product], tokens, Epilogue(EPS, **NORM))
            tokens, normed = self.join([gelu_mlp(block.ff, normed)], tokens, Epilogue(EPS, **NORM))
        return normed

    def heads(self, num_heads: int, head_dim: int) -> Heads:
        """Those of an attention, and which of them this rank has."""
        layer = self.model.transformer_blocks[0].attn1.to_qkv
        return Heads(Split(num_heads, head_dim), layer.tp_rank, layer.tp_size)
