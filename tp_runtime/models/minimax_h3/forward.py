"""MiniMax H3's arithmetic: ComfyUI's ``MiniMaxH3Model`` (0.33, comfy/ldm/minimax/model.py).

One sequence of tokens, of text, conditions, sound and video. The audio latents' own scale is not
of the forward: ComfyUI's class applies it outside.

Shapes: L tokens, D model width, N heads on this rank, K head width, R times, of which every token
has one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...gpu.epilogue import Epilogue, Product
from ...gpu.graphs import fused
from ..forward import BlockName, Conditioning, ShardedForward, kept_blocks
from ..layers import attention, rms_norm, silu_gate, timestep_embedding
from ..token_shares import TokenShares
from .family import EPS, FAMILY, MODALITIES, MiniMaxH3Sizes
from .layers import (
    AUDIO,
    TEXT,
    VIDEO,
    ExactLinear,
    Frequencies,
    layout_of,
    packed,
    patchified,
    unpacked,
    unpatchified,
    with_noise,
)
from .payload import AUDIO_CONDITION, AUDIO_TIME, CONDITION, PATCH, VIDEO_TIME

# Scale and shift, if there are any, and weight.
NormRows = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]
_EXACT = ("proj_in", "audio_proj_in", "proj_out", "audio_proj_out")


class Forward(ShardedForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY
    sizes: MiniMaxH3Sizes

    @classmethod
    def build(cls, sizes: MiniMaxH3Sizes) -> nn.Module:  # type: ignore[override]
        """diffusers' module, with linears in fp32, and what pruned files have instead of an MLP."""
        module: Any = super().build(sizes)
        module.rope = Frequencies(sizes.frequencies)
        exact = list(_EXACT)
        if sizes.grid is None:
            exact += ["time_embedder.linear_1", "time_embedder.linear_2"]
        else:
            del module.time_embedder
            module.adaln_t_table = nn.Parameter(torch.empty(sizes.grid, sizes.time_dim))
            blocks = range(sizes.num_blocks)
            exact += [f"transformer_blocks.{i}.adaln_proj.linear" for i in blocks]
            exact.append("norm_out.linear")
        for path in exact:
            module.set_submodule(path, ExactLinear(module.get_submodule(path)))
        return module

    def condition(
        self,
        x: Sequence[torch.Tensor],
        context: torch.Tensor,
        minimax_payload: Mapping[str, Any],
        denoise_mask: torch.Tensor | None = None,
        audio_denoise_mask: torch.Tensor | None = None,
    ) -> Conditioning:
        """``before`` (L, D), the tokens of text and conditions; ``rotation`` (1, L, 1, n, 2) of all
        tokens; ``times`` (L,), the number of each one's time, and ``rows`` (L,) of its modulation.
        Masks: as ``payload.prepared`` makes them.
        """
        video, audio = x
        size = [length + length % 2 for length in video.shape[3:]]
        num_text, num_samples = context.shape[1], audio.shape[-1]
        layout = layout_of(num_text, (video.shape[2], *size), num_samples, minimax_payload)
        before = self._before(context[0], layout.conditions, minimax_payload)
        device = context.device

        def alike(count: int, number: int) -> torch.Tensor:
            return torch.full((count,), number, dtype=torch.int64, device=device)

        times, modalities = [alike(num_text, VIDEO_TIME)], [alike(num_text, TEXT)]
        if (tags := minimax_payload.get("text_token_tags")) is not None:
            modalities = [tags]
        for modality, places in layout.conditions:
            kind = AUDIO_CONDITION if modality == AUDIO else CONDITION
            times.append(alike(len(places), kind))
            modalities.append(alike(len(places), modality))
        num_audio = audio.shape[2] * num_samples
        num_video = len(layout.places) - len(before) - num_audio
        targets = (
            (num_audio, AUDIO_TIME, AUDIO, audio_denoise_mask),
            (num_video, VIDEO_TIME, VIDEO, denoise_mask),
        )
        for count, time, modality, of_mask in targets:
            times.append(alike(count, time) if of_mask is None else of_mask)
            modalities.append(alike(count, modality))
        of_tokens = torch.cat(times)
        return {
            "before": before,
            "rotation": self._rotation(layout.places.to(device), context.dtype),
            "times": of_tokens,
            "rows": of_tokens * MODALITIES + torch.cat(modalities),
        }

    def evaluate(
        self,
        x: Sequence[torch.Tensor],
        timesteps: torch.Tensor,
        before: torch.Tensor,
        rotation: torch.Tensor,
        times: torch.Tensor,
        rows: torch.Tensor,
        skip: Sequence[BlockName] = (),
    ) -> list[torch.Tensor]:
        """[(1, C, T, H, W), (1, C', 2, T')] → the same shapes; ``timesteps`` (R,) of 0 to 1."""
        model, (video, audio) = self.model, x
        height, width = video.shape[3:]
        padding = (0, width % 2, 0, height % 2, 0, 0)
        whole = F.pad(video, padding, mode="circular") if any(padding) else video
        made = model.audio_proj_in(packed(audio)), model.proj_in(patchified(whole))
        tokens = torch.cat((before, *(one.to(before.dtype) for one in made)))[None]
        shares, tokens = self.shared(tokens)
        rotation, rows = shares.own(rotation), shares.own(rows[None])[0]
        of_times = self._of_times(timesteps, before.dtype)
        blocks = [block for _, block in kept_blocks(model.transformer_blocks, skip)]
        modulations = [self._modulation(block, of_times, before.dtype) for block in blocks]

        def norm_before(place: int) -> NormRows:
            """Scale, shift and weight of the norm that a block, or the end, begins with."""
            if place == len(blocks):
                return None, None, model.norm_out.norm.weight
            shift, scale = modulations[place][:2]
            return scale, shift, blocks[place].norm1.weight

        normed = _first_norm(tokens, rows, *norm_before(0))
        for place, (block, modulation) in enumerate(zip(blocks, modulations, strict=True)):
            _, _, gate, shift, scale, mlp_gate = modulation
            after = Epilogue(EPS, gate, "rms", scale, shift, block.norm2.weight, streams=rows)
            product = _attend(block.attn, normed, rotation, shares)
            tokens, normed = self.join([product], tokens, after)
            after = Epilogue(EPS, mlp_gate, "rms", *norm_before(place + 1), streams=rows)
            tokens, normed = self.join([_feed_forward(block.ff, normed)], tokens, after)
        num_before, num_audio = len(before), len(made[0])
        normed = shares.whole(normed)
        modulation = model.norm_out.linear(of_times)
        predicted = _modulated(normed[0, num_before:], modulation, times[num_before:]).float()
        sound = unpacked(model.audio_proj_out(predicted[:num_audio]))
        grid = whole.shape[2], whole.shape[3] // PATCH[1], whole.shape[4] // PATCH[2]
        pictures = unpatchified(model.proj_out(predicted[num_audio:]), grid)
        return [-pictures[..., :height, :width].to(video.dtype), -sound.to(audio.dtype)]

    def _before(
        self, text: torch.Tensor, conditions: Sequence[Any], payload: Mapping[str, Any]
    ) -> torch.Tensor:
        """The tokens (L, D) of the text and of conditions, in the order of the sequence."""
        videos = self._embedded(payload, VIDEO, text.dtype)
        sounds = self._embedded(payload, AUDIO, text.dtype)
        tokens = [next(sounds if one.modality == AUDIO else videos) for one in conditions]
        return torch.cat((self._refined(text), *tokens))

    def _embedded(
        self, payload: Mapping[str, Any], modality: int, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """The tokens (L, D) of each condition of a modality."""
        seed, is_audio = payload["seed"], modality == AUDIO
        if is_audio:
            latents, share = payload["cond_audio_latents"], payload["audio_cond_noise_aug"]
        else:
            latents, share = payload["cond_video_latents"], payload["visual_cond_noise_aug"]
        embedder = self.model.audio_proj_in if is_audio else self.model.proj_in
        for one in latents:
            rows = packed(one) if is_audio else patchified(one)
            yield embedder(with_noise(rows, share, seed + is_audio)).to(dtype)

    def _refined(self, text: torch.Tensor) -> torch.Tensor:
        """(L, context_dim) → (L, D)."""
        tokens, refiner = self.model.context_embedder(text[None]), self.model.token_refiner
        for block in refiner.refiner_blocks:
            for norm, product in ((block.norm1, _attend), (block.norm2, _feed_forward)):
                layer = block.attn if norm is block.norm1 else block.ff
                linear, inputs = product(layer, rms_norm(tokens, norm.weight, EPS))
                tokens = linear(inputs) + tokens
        return rms_norm(tokens, refiner.final_norm.weight, EPS)[0]

    def _rotation(self, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Cosines and sines of the angles by time, row and column, in the dtype of the tokens."""
        angles = (places.float()[..., None] * self.model.rope.inv_freq).flatten(1)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).to(dtype)[None, :, None]

    def _of_times(self, times: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(R,) → (R, n), what modulation is computed from."""
        if self.sizes.grid is None:
            embedder = self.model.time_embedder
            embedded = embedder.linear_1(timestep_embedding(times, self.sizes.time_channels or 0))
            return F.silu(embedder.linear_2(F.silu(embedded)).to(dtype))
        table = self.model.adaln_t_table
        places = times.clamp(0.0, 1.0) * (len(table) - 1)
        first = places.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[first], table[first + 1], (places - first)[:, None])

    def _modulation(
        self, block: Any, of_times: torch.Tensor, dtype: torch.dtype
    ) -> Sequence[torch.Tensor]:
        """Shift, scale and gate of both halves, a row (R · 3, 1, D) for each time and modality."""
        found = block.adaln_proj.linear(of_times).to(dtype)
        return found.view(len(of_times) * MODALITIES, 1, 6, -1).unbind(2)


def _attend(
    attend: Any,
    normed: torch.Tensor,
    rotation: torch.Tensor | None = None,
    shares: TokenShares | None = None,
) -> Product:
    width = attend.norm_q.weight.shape[0]
    q, k, v = (part.unflatten(-1, (-1, width)) for part in attend.to_qkv(normed).chunk(3, dim=-1))
    q, k = rms_norm(q, attend.norm_q.weight, EPS), rms_norm(k, attend.norm_k.weight, EPS)
    if rotation is not None:
        q, k = _rotated(q, rotation), _rotated(k, rotation)
    return attend.to_out[0], (shares.attention if shares else attention)(q, k, v)


def _feed_forward(layer: Any, normed: torch.Tensor) -> Product:
    return layer.net[2], silu_gate(layer.net[0].proj(normed))


@fused
def _rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """The first features of (B, L, N, K), each with the one that lies half of them further on."""
    count = rotation.shape[-2]
    cos, sin = rotation.unbind(-1)
    first, second, rest = x.split((count, count, x.shape[-1] - 2 * count), dim=-1)
    return torch.cat((cos * first - sin * second, sin * first + cos * second, rest), dim=-1)


@fused
def _first_norm(
    tokens: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
) -> torch.Tensor:
    """What a block is given that nothing is joined before."""
    normed = rms_norm(tokens, weight, EPS)
    if scale is None or shift is None:
        return normed
    return torch.addcmul(shift[rows, 0], normed, 1 + scale[rows, 0])


@fused
def _modulated(normed: torch.Tensor, modulation: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """(L, D) by shifts and scales (R, 2 · D), in the dtype of both."""
    shift, scale = modulation.chunk(2, dim=-1)
    return normed * (1.0 + scale[times]) + shift[times]
