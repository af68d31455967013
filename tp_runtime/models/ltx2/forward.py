"""LTX-2's arithmetic: ComfyUI's ``LTXAVModel._forward`` (0.33, comfy/ldm/lightricks/av_model.py).

Shapes: B batch, C channels, T H W frames and size of the latent, L tokens, D width of a stream, N
heads on this rank, K head width, F timesteps of an item.

Sums over the ranks: every block has eight, four of its video's tokens and four of its sound's; and
four more of the squares of queries and keys, of both streams at once where both are known. They
would be twelve.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..forward import BlockName, Conditioning, kept_blocks
from ..layers import timestep_embedding
from ..token_shares import TokenShares
from .blocks import BEFORE_ITSELF, Norm, Stream, first_norm
from .connectors import ConnectorsForward
from .family import AUDIO_BINS, AUDIO_CHANNELS, FAMILY, LTX2Sizes
from .guides import (
    Guides,
    check_plain,
    looked_at,
    single_pictures,
    tokens_of,
    varies_in_a_frame,
)
from .layers import (
    audio_positions,
    middle_of,
    reference_positions,
    rotation_of,
    row_of,
)

PERTURBED = "stg_self_attn_blocks"


class Forward(ConnectorsForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY
    sizes: LTX2Sizes

    def condition(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frame_rate: float = 25,
        keyframe_idxs: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        guide_attention_entries: Sequence[Mapping[str, Any]] = (),
        ref_audio: Mapping[str, torch.Tensor] | None = None,
        generated_keyframes: Mapping[str, int] | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``captions``: of video and of sound, each (B, L, D). ``rotations``: of this rank's heads,
        (B or 1, L, N, K/2, 2), of video, of video where it meets sound, and the same of sound.

        ``by_frame``: whether all tokens of a frame have its timestep. ``directions``: whether video
        looks at sound, and sound at video. If present: ``kept`` tokens of the video, and
        ``kept_frames``; ``guides``, that are looked at more or less; ``mark`` (B or 1, L, D), which
        is added to tokens that are one picture each; the ``reference`` (B, L, C), sound that goes
        before; the captions' ``mask``; and ``plain`` blocks.
        """
        video, *sounds = _latents(x)
        size, sizes = video.shape[2:], self.sizes
        options = transformer_options or {}
        check_plain(sizes, frame_rate, ref_audio, options.get(PERTURBED))
        tokens = tokens_of(size, sizes.causal, keyframe_idxs, denoise_mask, video.device)
        found: Conditioning = {"by_frame": not varies_in_a_frame(denoise_mask)}
        if len(tokens.guides_left):
            found["kept"] = tokens.left.nonzero()[:, 0]
            found["kept_frames"] = tokens.left[:: math.prod(size[1:])].nonzero()[:, 0]
        if guides := looked_at(guide_attention_entries, tokens, video):
            found["guides"] = guides
        if sizes.keyframe_mark:
            marked = single_pictures(tokens, size, generated_keyframes)[..., None]
            found["mark"] = marked.to(video.dtype) * self.model.keyframes_abs_pos_embedding
        positions = tokens.pixels.float()
        positions[:, 0] *= 1.0 / frame_rate
        found["rotations"] = self._rotations(
            positions, sizes.num_heads, sizes.head_dim, video.dtype
        )
        found["directions"] = tuple(
            bool(options.get(name, True)) for name in ("a2v_cross_attn", "v2a_cross_attn")
        )
        captions = context.split(sizes.caption_dims, dim=-1)
        if sizes.projects:
            layers = self.model.caption_projection, self.model.audio_caption_projection
            captions = tuple(layer(one) for layer, one in zip(layers, captions, strict=True))
        found["captions"] = captions
        for sound in _heard(video, sounds, ref_audio):
            positions = audio_positions(0, sound.shape[2], video.device)
            if ref_audio is not None:
                reference = ref_audio["tokens"].to(sound).expand(len(sound), -1, -1)
                found["reference"] = reference
                placed = reference_positions(reference.shape[1], video.device)
                positions = torch.cat((placed, positions), dim=2)
            heads = sizes.audio_heads, sizes.audio_head_dim
            found["rotations"] += self._rotations(positions, *heads, video.dtype)
        if attention_mask is not None:
            found["mask"] = _scores(attention_mask, video.dtype)
        if plain := options.get(PERTURBED):
            found["plain"] = tuple(plain)
        return found

    def evaluate(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        timesteps: torch.Tensor,
        captions: Sequence[torch.Tensor],
        rotations: Sequence[torch.Tensor],
        by_frame: bool,
        directions: tuple[bool, bool],
        kept: torch.Tensor | None = None,
        kept_frames: torch.Tensor | None = None,
        guides: Guides | None = None,
        mark: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        plain: Sequence[int] = (),
        skip: Sequence[BlockName] = (),
        a_timestep: torch.Tensor | None = None,
        latest_times: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """(B, C, T, H, W), and (B, 8, T', 16) of sound if there is any → the same.

        ``timesteps`` of the video, ``a_timestep`` of the sound: (B,), or (B, L, 1);
        ``latest_times`` (1,) of each, in the batch that this is a part of, if it may be one.
        """
        model, (video, *sounds) = self.model, _latents(x)
        per_frame, repeats = math.prod(video.shape[3:]), 1
        times = timesteps.reshape(len(video), -1)
        of_tokens = times if kept is None or times.shape[1] == 1 else times[:, kept]
        if by_frame and times.shape[1] % per_frame == 0:
            times, repeats = times[:, ::per_frame], per_frame
            times = times if kept_frames is None else times[:, kept_frames]
        else:
            times = of_tokens
        scale = self.sizes.time_scale
        times = times * scale
        # Of all tokens: where a frame has one, it is its first one's.
        latest_of_items = of_tokens.amax(dim=1, keepdim=True) * scale
        latest = latest_of_items if latest_times is None else latest_times[0] * scale
        tokens = video.flatten(2).transpose(1, 2)
        shares, tokens = self.shared(tokens if kept is None else tokens[:, kept])
        tokens = model.proj_in(tokens)
        if mark is not None:
            tokens = tokens + shares.own(mark)
        streams, latest_of_sound = [], None
        for sound in _heard(video, sounds, reference):
            of_sound = timesteps if a_timestep is None else a_timestep
            sound_times = of_sound.reshape(len(sound), -1)
            of_sound = sound.transpose(1, 2).flatten(2)
            if reference is not None:  # which is at time 0
                of_sound = torch.cat((reference, of_sound), dim=1)
                sound_times = sound_times.expand(-1, sound.shape[2])
                before = sound_times.new_zeros(reference.shape[:2])
                sound_times = torch.cat((before, sound_times), dim=1)
            sound_shares, of_sound = self.shared(of_sound)
            of_sound = model.audio_proj_in(of_sound)
            sound_times = sound_times * scale
            sound_pair = rotations[2], rotations[3]
            latest_of_sound = latest_of_each = sound_times.amax(dim=1, keepdim=True)
            if latest_times is not None and sounds:  # not a reference alone, which is at time 0
                latest_of_sound = latest_times[1] * scale
            of_audio = captions[1], sound_pair, sound_shares, sound_times, latest_of_each, latest
            streams.append(self._stream("audio", of_sound, *of_audio))
        pair = rotations[0], rotations[1]
        of_video = captions[0], pair, shares, times, latest_of_items, latest_of_sound
        streams.append(self._stream("video", tokens, *of_video, repeats, guides))

        blocks = kept_blocks(model.transformer_blocks, skip)
        lasts = [self._last_norm(stream) for stream in streams]

        def norms(place: int) -> list[Norm]:
            if place == len(blocks):
                return lasts
            return [stream.norm(blocks[place][1], BEFORE_ITSELF) for stream in streams]

        for stream, norm in zip(streams, norms(0), strict=True):
            stream.normed = first_norm(stream.tokens, **norm)
        for place, (number, block) in enumerate(blocks):
            shared = mask, directions, number in plain
            self.run_block(block, streams, norms(place + 1), *shared)
        results = [self._video(streams[-1], video.shape, kept)]
        for sound, stream in zip(sounds, streams, strict=False):
            projected = stream.shares.whole(model.audio_proj_out(stream.normed))
            projected = projected[:, -sound.shape[2] :]
            results.append(projected.unflatten(2, (-1, AUDIO_BINS)).transpose(1, 2))
        return results

    def _stream(
        self,
        which: str,
        tokens: torch.Tensor,
        caption: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        shares: TokenShares,
        times: torch.Tensor,
        latest_times: torch.Tensor,
        other_times: torch.Tensor | None,
        repeats: int = 1,
        guides: Guides | None = None,
    ) -> Stream:
        """Of this rank's tokens before the first block. ``times`` (B, F) are of all tokens, as
        ``rotations`` are; ``latest_times`` (B, 1), and ``other_times``, the other stream's latest.
        """
        model, sizes, dtype = self.model, self.sizes, tokens.dtype
        if repeats == 1 and times.shape[1] > 1:
            times = shares.own(times)
        own, meeting = map(shares.own, rotations)
        prefix, direction = ("", "a2v") if which == "video" else ("audio_", "v2a")
        head_dim = sizes.head_dim if which == "video" else sizes.audio_head_dim
        of_time, last = _modulation(getattr(model, f"{prefix}time_embed"), times, dtype)
        stream = Stream(
            prefix, which, tokens.shape[-1], head_dim, tokens, tokens, of_time, last, repeats,
            caption, (own, meeting), shares, guides,
        )  # fmt: skip
        if sizes.text_modulation:
            module = getattr(model, f"{prefix}prompt_adaln")
            stream.prompt, _ = _modulation(module, latest_times, dtype)
        if other_times is not None:
            name = f"av_cross_attn_{which}"
            stream.cross, _ = _modulation(getattr(model, f"{name}_scale_shift"), times, dtype)
            factor = sizes.cross_time_scale / sizes.time_scale
            latest = (other_times.max() * factor).reshape(1, 1)
            gate, _ = _modulation(getattr(model, f"{name}_{direction}_gate"), latest, dtype)
            stream.gate = gate.expand(len(tokens), -1, -1, -1)
        return stream

    def _last_norm(self, stream: Stream) -> Norm:
        table, of_time = stream.part(self.model, "scale_shift_table"), stream.last[:, :, None]
        shift, scale = (
            row_of(table[index:], of_time, 0, stream.repeats, stream.shares) for index in (0, 1)
        )
        return {"norm": "layer", "shift": shift, "scale": scale}

    def _video(self, stream: Stream, shape: torch.Size, kept: torch.Tensor | None) -> torch.Tensor:
        """All tokens as latents of that shape; zero where none was kept."""
        found = stream.shares.whole(self.model.proj_out(stream.normed))
        if kept is not None:
            whole = found.new_zeros(shape[0], math.prod(shape[2:]), found.shape[-1])
            whole[:, kept] = found
            found = whole
        return found.transpose(1, 2).unflatten(2, shape[2:])

    def _rotations(
        self, positions: torch.Tensor, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of tokens (B, axes, L, 2): along all axes, and along time, where the streams meet."""
        sizes = self.sizes
        limits = sizes.max_positions if positions.shape[1] > 1 else sizes.audio_max_positions
        meeting = (max(sizes.max_positions[0], sizes.audio_max_positions[0]),)
        given = middle_of(positions, sizes.middle), limits, self.heads(num_heads, head_dim)
        sound = self.heads(sizes.audio_heads, sizes.audio_head_dim)
        along_time = middle_of(positions[:, :1]), meeting, sound
        return (
            rotation_of(*given, sizes.precision, dtype),
            rotation_of(*along_time, sizes.precision, dtype),
        )


def _latents(x: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else x


def _heard(
    video: torch.Tensor, sounds: Sequence[torch.Tensor], reference: Any
) -> Sequence[torch.Tensor]:
    """The ``sounds`` that the video meets: a ``reference`` without any goes before an empty one."""
    if sounds or reference is None:
        return sounds
    return [video.new_zeros(len(video), AUDIO_CHANNELS, 0, AUDIO_BINS)]


def _modulation(
    module: Any, times: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, F, n, D) of timesteps (B, F), and their embedding (B, F, D)."""
    embedded = module.emb.timestep_embedder(timestep_embedding(times).to(dtype))
    return module.linear(F.silu(embedded)).unflatten(-1, (-1, embedded.shape[-1])), embedded


def _scores(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of a caption's tokens, 0 or 1, as what is added to scores."""
    if mask.is_floating_point():
        return mask
    of_each = (mask.long() - 1).to(dtype).reshape(len(mask), 1, -1, mask.shape[-1])
    return of_each * torch.finfo(dtype).max
