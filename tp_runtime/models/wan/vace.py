"""VACE: control videos pass through blocks of their own, which add to the tokens of the model's.

ComfyUI's ``VaceWanModel`` (0.3.75, comfy/ldm/wan/model.py). Shapes as in ``forward``.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import InputError
from ..forward import Conditioning
from ..layers import first_norms
from ..token_shares import TokenShares
from .layers import Pair, Rows, as_tokens, before_block, check_length

if TYPE_CHECKING:
    from .forward import Forward


def of_videos(
    forward: "Forward",
    x: torch.Tensor,
    context: torch.Tensor,
    strengths: Sequence[float],
    text: torch.Tensor,
    positions: torch.Tensor,
) -> Conditioning:
    """``vace`` (n, B, L, D), the tokens of n control videos ``context`` (B, n, C, T, H, W), with
    their strengths, and ``vace_keys`` and ``vace_values`` of the caption in VACE's blocks.

    ``text``: the caption's features. Raises InputError for videos of another size than the latent
    ``x`` of those ``positions``, or other than as many strengths.
    """
    model, videos = forward.model, context.transpose(0, 1)
    if len(strengths) != len(videos):
        raise InputError(
            f"{len(videos)} control videos of {forward.label} need as many strengths; got "
            f"{len(strengths)}. Set them with 'WanVaceToVideo', one node for each video."
        )
    embedded = model.vace_patch_embedding(videos.flatten(0, 1).float())
    tokens = as_tokens(embedded.to(x.dtype))
    check_length("Control videos", context, tokens, positions)
    of_text = [(block.attn2.norm_k, block.attn2.to_kv) for block in model.vace_blocks]
    keys, values = forward.keys_and_values(forward.embedded_text(text), of_text)
    return {
        "vace": tokens.unflatten(0, videos.shape[:2]),
        "vace_strength": tuple(strengths),
        "vace_keys": keys,
        "vace_values": values,
    }


def hints(
    forward: "Forward",
    tokens: torch.Tensor,
    videos: torch.Tensor,
    strengths: Sequence[float],
    of_text: Sequence[Pair],
    rotation: torch.Tensor,
    of_blocks: Sequence[Rows],
    shares: TokenShares,
    *,
    first_is_left_out: bool,
) -> Iterator[list[torch.Tensor]]:
    """For each VACE block what it adds to the tokens (B, L, D), of each control video.

    ``tokens``: the model's, before its first block. ``of_text``, ``of_blocks``: of each VACE block,
    the caption's keys and values, and its rows of modulation. ``first_is_left_out``: of the
    model's blocks.
    """
    blocks = forward.model.vace_blocks
    streams = [blocks[0].proj_in(shares.own(video)) + tokens for video in videos]

    def of_each() -> Iterator[list[torch.Tensor]]:
        for block, rows, pair in zip(blocks, of_blocks, of_text, strict=True):
            found: list[torch.Tensor] = []
            for index, (stream, strength) in enumerate(zip(streams, strengths, strict=True)):
                if block is blocks[0] and first_is_left_out:
                    # ComfyUI adds the hints to the very tokens that the next video's begin with.
                    stream = sum(found, start=stream)
                normed = first_norms([stream], before_block(rows))
                of_block = block, rows, [pair], rotation, None, shares.attention
                _, whole = forward.block(stream, normed, *of_block)
                found.append(block.proj_out(whole) * strength)
                streams[index] = whole.clone()  # the next sum overwrites it
            yield found

    return of_each()
