"""Wan's arithmetic: ComfyUI's ``WanModel._forward`` (0.3.75, comfy/ldm/wan/model.py).

Of ``SCAILWanModel`` it is that of 0.33.

Shapes: B batch, C channels, T H W frames and size of the latent, L tokens, D model width, N heads
on this rank, K head width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...gpu.epilogue import Epilogue, Product
from ..forward import BlockName, Conditioning, ShardedForward, kept_blocks, option
from ..layers import (
    HeadsOfRank,
    attention,
    first_norms,
    gelu_mlp,
    normed_over_ranks,
    project,
    rope_rotation,
)
from . import animate, animate2, scail
from . import vace as vace_videos
from .family import FAMILY, WanSizes
from .layers import (
    EPS,
    Pair,
    Rows,
    as_tokens,
    before_block,
    by_block,
    check_length,
    embedded_picture,
    frames_of,
    padded,
    positions_of,
    rows_of,
    sinusoids,
    unpatchified,
    with_variants,
)

ROPE_THETA = 10000.0

Prompt = Sequence[Pair]  # what a block looks at beside its tokens: the caption, and a picture
# q, k and v of this rank's tokens (B, l, N, K) → what they find among all (B, l, N·K).
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Forward(ShardedForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY
    sizes: WanSizes

    @classmethod
    def build(cls, sizes: WanSizes) -> nn.Module:  # type: ignore[override]
        """diffusers' module, with what variants of the model have beside it."""
        module = with_variants(super().build(sizes), sizes)
        if sizes.has_faces:
            animate.add_to(module, sizes)
        return module

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None = None,
        reference_latent: torch.Tensor | None = None,
        time_dim_concat: torch.Tensor | None = None,
        context_latents: Sequence[torch.Tensor] = (),
        camera_conditions: torch.Tensor | None = None,
        vace_context: torch.Tensor | None = None,
        vace_strength: Sequence[float] = (),
        pose_latents: torch.Tensor | None = None,
        ref_mask_latents: torch.Tensor | None = None,
        sam_latents: torch.Tensor | None = None,
        ref_mask_flag: bool | None = None,
        face_pixel_values: torch.Tensor | None = None,
        context_pose: torch.Tensor | None = None,
        clip_fea_pose: torch.Tensor | None = None,
        pose_strength: float = 1.0,
        reference_strength: float = 1.0,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``keys``, ``values`` (blocks, B, L, N, K) of the caption in every block; ``rotation``.

        If present: ``picture_keys`` and ``picture_values`` of CLIP's features; ``reference``
        (B, L, D), the tokens before the first frame's; ``more`` latents behind the last frame;
        ``others`` (B, L, D), the tokens of other videos and pictures (Bernini, SCAIL's poses),
        after all; ``added`` (B, L, D), the share of a camera, of masks or of poses in the tokens;
        ``face_keys`` and ``face_values`` (blocks, B, T, 5, N, K) of each frame's face; ``poses``,
        for each block keys and values (B, L', N, K) of a video of them (Wan Animate 2); ``vace``
        (n, B, L, D), the tokens of n control videos, with the ``vace_keys`` and ``vace_values`` of
        the caption in its blocks.
        """
        more = None if time_dim_concat is None else padded(time_dim_concat)
        uses_reference = reference_latent is not None and self.sizes.reference_channels
        frames = x.shape[2] + (0 if more is None else more.shape[2]) + bool(uses_reference)
        rope_options = option(transformer_options, "rope_options")
        positions = positions_of((frames, *x.shape[3:]), rope_options, x)
        found: Conditioning = {"rotation": self.rotation_of(positions)}
        found |= self.prompts_of(context, clip_fea)
        if uses_reference:
            assert reference_latent is not None
            found["reference"] = as_tokens(self.model.ref_conv(reference_latent))
        if more is not None:
            found["more"] = more
        if context_latents:
            latents = [padded(latent) for latent in context_latents]
            embedding = self.model.patch_embedding
            embedded = [self.of_patches(embedding, latent, x) for latent in latents]
            found["others"] = torch.cat(embedded, dim=1)
            rotations = [found["rotation"]]
            for number, latent in enumerate(latents, start=1):
                positions = positions_of(tuple(latent.shape[2:]), rope_options, x)
                rotations.append(self._turned(self.rotation_of(positions), number))
            found["rotation"] = torch.cat(rotations, dim=1)
        if self.sizes.pose_channels:
            pictures = reference_latent, ref_mask_latents
            poses = pose_latents, sam_latents
            size = frames, *x.shape[3:]
            found |= scail.of_poses(self, x, size, pictures, poses, ref_mask_flag, rope_options)
        if self.sizes.poses_pass:
            found["reference_strength"] = reference_strength
        if self.sizes.poses_pass and pose_latents is not None:
            seen_by_poses = (
                context if context_pose is None else context_pose,
                clip_fea if clip_fea_pose is None else clip_fea_pose,
            )
            passing = self, x, pose_latents, *seen_by_poses, pose_strength
            found["poses"] = animate2.of_poses(*passing)
        if self.sizes.has_faces and pose_latents is not None:
            grid = frames, -(-x.shape[3] // 2), -(-x.shape[4] // 2)
            embedding = self.model.pose_patch_embedding
            found["added"] = animate.of_poses(embedding, pose_latents, grid, x.dtype)
        if face_pixel_values is not None:
            faces = animate.of_faces(self.model, face_pixel_values, frames)
            of_faces = self.model.face_adapter, faces, self.sizes.head_dim
            found["face_keys"], found["face_values"] = animate.keys_and_values(*of_faces)
        if camera_conditions is not None and self.sizes.camera_channels:
            found["added"] = as_tokens(self.model.control_adapter(camera_conditions))
            check_length("Camera paths", camera_conditions, found["added"], positions)
        if vace_context is not None and self.sizes.vace_channels:
            found |= vace_videos.of_videos(self, x, vace_context, vace_strength, context, positions)
        return found

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        rotation: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        picture_keys: torch.Tensor | None = None,
        picture_values: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        more: torch.Tensor | None = None,
        others: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
        vace: torch.Tensor | None = None,
        vace_strength: Sequence[float] = (),
        vace_keys: torch.Tensor | None = None,
        vace_values: torch.Tensor | None = None,
        face_keys: torch.Tensor | None = None,
        face_values: torch.Tensor | None = None,
        poses: Sequence[Pair] = (),
        reference_strength: float = 1.0,
        skip: Sequence[BlockName] = (),
    ) -> torch.Tensor:
        """(B, C, T, H, W) → (B, out_channels, T, H, W); ``timesteps`` (B,) or (B, T)."""
        model, shape = self.model, x.shape
        x = padded(x)
        if more is not None:
            x = torch.cat((x, more), dim=2)
        embedded = model.patch_embedding(x.float()).to(x.dtype)
        grid, tokens = embedded.shape[2:], as_tokens(embedded)
        if added is not None:
            tokens = tokens + added
        num_before = 0
        if reference is not None:
            num_before = reference.shape[1]
            tokens = torch.cat((reference, tokens), dim=1)
        num_wanted = tokens.shape[1]
        if others is not None:
            tokens = torch.cat((tokens, others), dim=1)
        shares, tokens = self.shared(tokens)
        rotation = shares.own(rotation)
        time, modulation = self.embedded_time(timesteps, x.dtype)
        kept = kept_blocks(model.blocks, skip)
        frames = frames_of(shares, timesteps)
        rows = [rows_of(block.scale_shift_table, modulation, frames) for _, block in kept]
        rows.append(rows_of(model.scale_shift_table, time[:, :, None], frames))

        # After which of the blocks that are kept each other one adds something; -1: before them.
        places = [sum(i <= layer for i, _ in kept) - 1 for layer in self._layers_with_more]
        hints: Iterator[list[torch.Tensor]] = iter(())
        if vace is not None and vace_keys is not None and vace_values is not None:
            hints = vace_videos.hints(
                self,
                tokens,
                vace,
                vace_strength,
                list(zip(vace_keys, vace_values, strict=True)),
                rotation,
                [rows_of(one.scale_shift_table, modulation, frames) for one in model.vace_blocks],
                shares,
                first_is_left_out=-1 in places,
            )

        def with_hints(place: int, tokens: torch.Tensor) -> torch.Tensor:
            """A copy of the tokens, since the sums of the hints' blocks overwrite the last sum."""
            tokens = tokens.clone()
            for _ in range(places.count(place)):
                for hint in next(hints):
                    tokens += hint
            return tokens

        faces: list[tuple[Any, Pair]] = []
        if face_keys is not None and face_values is not None:
            pairs = zip(face_keys, face_values, strict=True)
            faces = list(zip(model.face_adapter, pairs, strict=True))
        per_frame = grid[1] * grid[2]
        prompts = by_block(keys, values, picture_keys, picture_values)

        def look_at_faces(
            place: int, tokens: torch.Tensor, normed: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Normed as the next block begins, by those that look at faces after a block."""
            here = [face for face, at in zip(faces, places, strict=False) if at == place]
            for left, (block, pair) in enumerate(here, start=1 - len(here)):
                product = animate.look_at_faces(block, normed, pair, per_frame, shares)
                after = before_block(Rows() if left else rows[place + 1])
                tokens, normed = self.join([product], tokens, after)
            return tokens, normed

        if vace is not None and -1 in places:
            tokens = with_hints(-1, tokens)
        begin = Rows() if faces and -1 in places else rows[0]
        normed = first_norms([tokens], before_block(begin))
        tokens, normed = look_at_faces(-1, tokens, normed)
        for place, (index, module) in enumerate(kept):
            has_hints = vace is not None and place in places
            after = None if has_hints else rows[place + 1]
            if faces and place in places:
                after = Rows()
            attend: Attend = shares.attention
            if self.sizes.poses_pass:
                seen = poses[index] if poses else None
                looks = partial(animate2.look_at_poses, seen, per_frame, reference_strength)
                attend = partial(shares.attention, attend=looks)
            of_block = module, rows[place], prompts[index], rotation, after, attend
            tokens, normed = self.block(tokens, normed, *of_block)
            tokens, normed = look_at_faces(place, tokens, normed)
            if has_hints:
                tokens = with_hints(place, normed)
                normed = first_norms([tokens], before_block(rows[place + 1]))
        found = shares.whole(model.proj_out(normed))[:, num_before:num_wanted]
        return unpatchified(found, grid)[:, :, : shape[2], : shape[3], : shape[4]]

    def block(
        self,
        tokens: torch.Tensor,
        normed: torch.Tensor,
        block: Any,
        rows: Rows,
        prompt: Prompt,
        rotation: torch.Tensor,
        following: Rows | None,
        attend: Attend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``join``'s results at the end of a block.

        Normed as the block that the rows ``following`` are of begins; empty: without a modulation;
        None: not normed.
        """
        (_, _, gate, mlp_shift, mlp_scale, mlp_gate), frames = rows
        affine = {"weight": block.norm2.weight, "bias": block.norm2.bias}
        product = self._attend(block.attn1, normed, rotation, attend)
        after = Epilogue(EPS, gate, "layer", **affine, streams=frames)
        tokens, normed = self.join([product], tokens, after)
        product = self._attend_to_prompt(block.attn2, normed, prompt)
        after = Epilogue(EPS, None, "layer", mlp_scale, mlp_shift, streams=frames)
        tokens, normed = self.join([product], tokens, after)
        if following is None:
            after = Epilogue(EPS, mlp_gate, streams=frames)
        else:
            after = before_block(following, mlp_gate)
        return self.join([gelu_mlp(block.ffn, normed)], tokens, after)

    @property
    def _layers_with_more(self) -> Sequence[int]:
        """The block that each VACE block adds to, or after which the model looks at faces."""
        if self.sizes.has_faces:
            return animate.layers(self.sizes)
        if not self.sizes.vace_blocks:
            return ()
        return range(0, self.sizes.num_blocks, self.sizes.num_blocks // self.sizes.vace_blocks)

    def of_patches(self, embedding: Any, latents: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, T, H, W) as tokens (B, L, D), embedded in fp32, in the dtype of ``x``."""
        return as_tokens(embedding(padded(latents).float()).to(x.dtype))

    def rotation_of(self, positions: torch.Tensor) -> torch.Tensor:
        return rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA)

    def _turned(self, rotation: torch.Tensor, number: int) -> torch.Tensor:
        """A rotation turned on by a number that all features of a head turn with."""
        position = torch.full((1, 1), float(number), device=rotation.device)
        cos, sin = rope_rotation(position, (self.sizes.head_dim,), ROPE_THETA).unbind(-1)
        c, s = rotation.unbind(-1)
        return torch.stack((c * cos - s * sin, c * sin + s * cos), dim=-1)

    def prompts_of(self, context: torch.Tensor, clip_fea: torch.Tensor | None) -> Conditioning:
        """``keys``, ``values`` (blocks, B, L, N, K) of the caption in every block.

        Where models look at a picture, ``picture_keys`` and ``picture_values``, too.
        """
        text, blocks = self.embedded_text(context), self.model.blocks
        found = Conditioning()
        of_text = [(block.attn2.norm_k, block.attn2.to_kv) for block in blocks]
        found["keys"], found["values"] = self.keys_and_values(text, of_text)
        if self.sizes.image_dim:
            # Without features ComfyUI gives these layers the caption, too.
            embedder = self.model.condition_embedder.image_embedder
            picture = text if clip_fea is None else embedded_picture(embedder, clip_fea)
            of_picture = [(block.attn2.norm_added_k, block.attn2.to_added_kv) for block in blocks]
            pair = self.keys_and_values(picture, of_picture)
            found["picture_keys"], found["picture_values"] = pair
        return found

    def embedded_text(self, context: torch.Tensor) -> torch.Tensor:
        embedder = self.model.condition_embedder.text_embedder
        return embedder.linear_2(project(embedder.linear_1, context, gelu=True))

    def keys_and_values(
        self, tokens: torch.Tensor, layers: Sequence[tuple[Any, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) → keys and values of every block (blocks, B, L, N, K)."""
        keys, values = [], []
        for norm, to_kv in layers:
            k, v = to_kv(tokens).chunk(2, dim=-1)
            keys += self._normed([(k, norm.weight)])
            values.append(self._heads(v))
        return torch.stack(keys), torch.stack(values)

    def _normed(
        self,
        parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        rotation: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Each (B, L, D) and its norm's weights → its heads (B, L, N, K)."""
        sizes = self.sizes.dim, self.sizes.head_dim
        heads = [HeadsOfRank(*part, *sizes, rotation) for part in parts]
        return normed_over_ranks(heads, EPS, self.collectives.add_up)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.sizes.head_dim))

    def embedded_time(
        self, timesteps: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedding (B, F, D) of the timesteps, one or one a frame; of blocks (B, F, 6, D)."""
        embedder = self.model.condition_embedder
        time = embedder.time_embedder(sinusoids(timesteps.flatten()).to(dtype))
        time = time.unflatten(0, (timesteps.shape[0], -1))
        return time, embedder.time_proj(F.silu(time)).unflatten(-1, (6, -1))

    def _attend(
        self, module: Any, normed: torch.Tensor, rotation: torch.Tensor, attend: Attend
    ) -> Product:
        q, k, v = module.to_qkv(normed).chunk(3, dim=-1)
        parts = (q, module.norm_q.weight), (k, module.norm_k.weight)
        q, k = self._normed(parts, rotation)
        return module.to_out[0], attend(q, k, self._heads(v))

    def _attend_to_prompt(
        self,
        attend: Any,
        normed: torch.Tensor,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> Product:
        (q,) = self._normed([(attend.to_q(normed), attend.norm_q.weight)])
        found = [attention(q, k, v) for k, v in pairs]
        return attend.to_out[0], found[0] if len(found) == 1 else found[0] + found[1]
