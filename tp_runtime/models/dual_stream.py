"""What the families with a stream of text and one of image tokens share: their joint attention, and
the loop over blocks of two streams and of one.

Their attention modules have diffusers' names; the arithmetic is ComfyUI's (0.3.75, comfy/ldm/flux/
and comfy/ldm/qwen_image/), whose order of operations shows in the last bits.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from ..errors import InputError
from ..gpu.epilogue import Epilogue, Product
from .forward import BlockName, Conditioning, ShardedForward
from .layers import embedded_time, first_norms, heads_of, project, project_apart, rotated_heads
from .residuals import BlockPatch, add_residuals, check_control, check_hint, residuals_between
from .token_shares import TokenShares

NORM_EPS = 1e-6

# --- blocks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockInputs:
    """What every block of an evaluation is given beside this rank's tokens.

    ``shares``: of text, image and late tokens, which have a modulation of their own. ``rotation``:
    of this rank's; ``mask``: of all tokens, as ``shares`` orders them.
    """

    shares: TokenShares
    rotation: torch.Tensor
    mask: torch.Tensor | None

    @property
    def num_text(self) -> int:
        return self.shares.own_length(0)

    @property
    def has_late(self) -> bool:
        """Whether any rank has late tokens."""
        return self.shares.lengths[2] > 0

    def begin_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Of this rank's tokens to all: (B, L, N, K) of each → what computes (B, L, N·K)."""
        return self.shares.begin_attention(q, k, v, self.mask)

    def first_norms(self, tokens: torch.Tensor, shift_and_scale: torch.Tensor) -> torch.Tensor:
        """Of tokens that nothing is joined to before; by (S or 1, B, 2, D)."""
        streams = [self.shares.of_stream(tokens, stream) for stream in range(2 + self.has_late)]
        shift, scale = shift_and_scale.expand(len(streams), -1, -1, -1).unbind(2)
        return first_norms(streams, Epilogue(NORM_EPS, None, "layer", scale, shift))


# From normed tokens to the row-parallel linear that ends an MLP, with its input; and to those that
# end a part of a block, one of each stream.
FeedForward = Callable[[torch.Tensor], Product]
Part = Callable[[torch.Tensor, BlockInputs], list[Product]]


@dataclass(frozen=True)
class Block:
    """A block to evaluate. ``modulation`` (S, B, n, D): its own, the first norm's shift and scale
    first; of text, image and late tokens, or fewer where they are the same. ``parts``: its
    attention and its MLP, or both at once; with each the index of its gate, and of the next norm's
    shift, if any.
    """

    name: BlockName
    modulation: torch.Tensor
    parts: tuple[tuple[Part, int], ...]

    def epilogue(
        self, gate: int, num_products: int, norm: torch.Tensor | None, given: BlockInputs
    ) -> Epilogue:
        """Of a part with that gate. ``norm`` (S or 1, B, 2, D): shift and scale of the norm after
        it, if there is one.
        """
        num_streams = num_products + given.has_late
        own = self.modulation[-num_streams:]  # all the same but for the late tokens'
        found = Epilogue(NORM_EPS, own[..., gate, :], num_late=given.shares.own_length(2))
        if norm is None:
            return found
        shift, scale = norm[-num_streams:].expand(num_streams, -1, -1, -1).unbind(2)
        return found._replace(norm="layer", scale=scale, shift=shift)


def dual_blocks(
    modules: Sequence[Any],
    modulations: Sequence[torch.Tensor],
    feed_forwards: Callable[[Any], tuple[FeedForward, FeedForward]],
) -> list[Block]:
    """Blocks with two streams, which meet in attention. ``feed_forwards``: of text and image."""
    return [
        Block(
            ("double_block", number),
            modulation,
            ((_joint_attention(module.attn), 2), (_mlps(*feed_forwards(module)), 5)),
        )
        for number, (module, modulation) in enumerate(zip(modules, modulations, strict=True))
    ]


def single_blocks(
    modules: Sequence[Any], modulations: Sequence[torch.Tensor], part: Callable[[Any], Part]
) -> list[Block]:
    """Blocks with one stream; ``part``: see ``attention_beside_mlp``."""
    return [
        Block(("single_block", number), modulation, ((part(module), 2),))
        for number, (module, modulation) in enumerate(zip(modules, modulations, strict=True))
    ]


def attention_beside_mlp(
    norms: Any,
    into: Any,
    out: Any,
    activated: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Part:
    """``norms``: with the norms of q and k. ``into``: the linear of q, k, v and the MLP's features.

    ``out`` ends both; its input is ``activated`` of what attention gives and of these features,
    which are computed while tokens are on their way to the ranks that they are shared with.
    """

    def compute(normed: torch.Tensor, given: BlockInputs) -> list[Product]:
        width = sum(into.output_partition_sizes[:3])
        qkv, features = project_apart(into, normed, width, apart=given.shares.travel_beside)
        heads = heads_of(qkv, norms.norm_q, norms.norm_k)
        attended = given.begin_attention(*rotated_heads([heads], given.rotation, NORM_EPS))
        beside = features()
        return [(out, activated(attended(), beside))]

    return compute


def _joint_attention(attend: Any) -> Part:
    def compute(normed: torch.Tensor, given: BlockInputs) -> list[Product]:
        text, image = normed[:, : given.num_text], normed[:, given.num_text :]
        added = project(attend.to_added_qkv, text)
        of_text = heads_of(added, attend.norm_added_q, attend.norm_added_k)
        of_image = heads_of(project(attend.to_qkv, image), attend.norm_q, attend.norm_k)
        q, k, v = rotated_heads([of_text, of_image], given.rotation, NORM_EPS)
        found = given.begin_attention(q, k, v)()
        text, image = found[:, : given.num_text], found[:, given.num_text :]
        return [(attend.to_add_out, text), (attend.to_out[0], image)]

    return compute


def _mlps(of_text: FeedForward, of_image: FeedForward) -> Part:
    def compute(normed: torch.Tensor, given: BlockInputs) -> list[Product]:
        return [of_text(normed[:, : given.num_text]), of_image(normed[:, given.num_text :])]

    return compute


# --- their evaluation --------------------------------------------------------------------------


def joint_mask(mask: torch.Tensor | None, batch: int, num_tokens: int) -> torch.Tensor | None:
    """(L, L), (B, L, L) or (B, 1, L, L) → four axes, as ComfyUI's attention understands them.

    Raises InputError for another shape.
    """
    if mask is None:
        return None
    four = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    fits = four.ndim == 4 and four.shape[0] in (1, batch)
    if not fits or four.shape[1:] != (1, num_tokens, num_tokens):
        raise InputError(
            f"The attention mask of the conditioning has the shape {tuple(mask.shape)}; these "
            f"{batch} latents and captions are {num_tokens} tokens together. Encode the prompt "
            "again, and leave out nodes that change its mask."
        )
    return four


class Streams(NamedTuple):
    """Tokens (B, L, D). ``zero_time``: the references have a modulation of their own."""

    text: torch.Tensor
    image: torch.Tensor
    references: torch.Tensor | None = None
    zero_time: bool = False

    def with_late(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of text; of the image, with references behind it; and those with another modulation."""
        text, image, references, zero_time = self
        if references is None:
            return text, image, image[:, :0]
        if zero_time:
            return text, image, references
        return text, torch.cat((image, references), dim=1), references[:, :0]


class DualStreamForward(ShardedForward):
    """A forward that takes references, a ControlNet's residuals for its image, and model patches.

    ``condition`` finds ``text`` (B, L, D); the ``rotation`` of text, image and references; the
    ``references`` (B, L, D) or None, and ``zero_time``, whether they are at time 0. ``limit``: in
    fp16, tokens that overflow are brought back after every block.
    """

    limit: ClassVar[bool] = False

    def check_model_patches(self, x: torch.Tensor, listed: Sequence[Mapping[str, Any]]) -> None:
        length = self.sizes.geometry.image_tokens(x.shape)
        for one in listed:
            check_hint(self.label, one["hint"], x.shape[0], length, self.sizes.dim)

    def check_control(
        self, batch: int, conditioning: Conditioning, control: Mapping[str, Any]
    ) -> None:
        length = conditioning["rotation"].shape[1] - conditioning["text"].shape[1]
        check_control(self.label, control, batch, length, self.sizes.dim)

    def embedded_guidance(
        self, embedders: Any, guidance: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """(B,) → (B, D), scaled in its own dtype, as ComfyUI does; None for models without it."""
        if guidance is None or not self.sizes.guidance:
            return None
        return embedded_time(embedders.guidance_embedder, guidance, dtype)

    def run_blocks(
        self,
        blocks: Sequence[Block],
        last_norm: torch.Tensor,
        streams: Streams,
        rotation: torch.Tensor,
        mask: torch.Tensor | None,
        skip: Collection[BlockName] = (),
        control: Mapping[str, Any] | None = None,
        model_patches: Sequence[Mapping[str, Any]] = (),
    ) -> torch.Tensor:
        """The image's tokens (B, L, D) after all blocks that are not skipped, and the last norm.

        ``last_norm`` (1, B, 2, D): its shift and scale.
        """
        shares, tokens = self.shared(*streams.with_late())
        rotation, mask = shares.own_of_all(rotation), shares.in_their_order(mask)
        given = BlockInputs(shares, rotation, mask)
        patches = self._block_patches(model_patches, shares)
        residuals = residuals_between(control, [block.name for block in blocks], skip, patches)
        blocks = [block for block in blocks if block.name not in skip]
        # Shift and scale of every block's first norm, and of the last norm.
        norms = [*(block.modulation[..., :2, :] for block in blocks), last_norm]
        add_residuals(tokens, residuals[0], shares)
        normed = given.first_norms(tokens, norms[0])
        for block, next_norm, added in zip(blocks, norms[1:], residuals[1:], strict=True):
            for part, gate in block.parts[:-1]:
                products = part(normed, given)
                inner_norm = block.modulation[..., gate + 1 : gate + 3, :]
                after = block.epilogue(gate, len(products), inner_norm, given)
                tokens, normed = self.join(products, tokens, after)
            part, gate = block.parts[-1]
            products = part(normed, given)
            after = block.epilogue(gate, len(products), None if patches else next_norm, given)
            if not patches:  # the join after it only adds to the tokens, too
                add_residuals(tokens, added, shares)
            tokens, normed = self.join(products, tokens, after._replace(limit=self.limit))
            if patches:  # which look at the tokens that the block has made
                tokens = normed.clone()
                add_residuals(tokens, added, shares)
                normed = given.first_norms(tokens, next_norm)
        return shares.whole(normed, 1)[:, : streams.image.shape[1]]

    def _block_patches(
        self, listed: Sequence[Mapping[str, Any]], shares: TokenShares
    ) -> list[BlockPatch]:
        return [
            BlockPatch(
                self.model_patches[one["name"]].residual,
                shares.own_of(one["hint"], 1),
                one["strength"],
            )
            for one in listed
        ]
