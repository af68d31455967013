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
from torch import nn

from ...errors import InputError
from ...gpu.epilogue import Epilogue
from ...sharding.plan import Split
from ..dual_stream import BlockName, skipped_blocks
from ..forward import Conditioning
from ..layers import timestep_embedding
from .blocks import BEFORE_ITSELF, NORM, Norm, Stream, StreamsForward, at_itself, first_norm, mlp
from .family import AUDIO_BINS, FAMILY, MIN_CAPTION, REGISTERS, TIME_CHANNELS, LTX2Sizes
from .layers import (
    EPS,
    Guides,
    Heads,
    audio_positions,
    guide_weights,
    guides_of,
    middle_of,
    reference_positions,
    rotation_of,
    row_of,
    video_positions,
)

CAPTION_POSITIONS = 4096


class Forward(StreamsForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY
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
        before; the captions' ``mask``; ``plain`` blocks, and those to ``skip``.
        """
        video, *sounds = _latents(x)
        size, sizes = video.shape[2:], self.sizes
        options = transformer_options or {}
        pixels = video_positions(size, sizes.causal, video.device)
        found: Conditioning = {"by_frame": not _varies_in_a_frame(denoise_mask)}
        num_guides = 0
        left = torch.ones(pixels.shape[2], dtype=torch.bool, device=video.device)
        if keyframe_idxs is not None and keyframe_idxs.shape[2]:
            self._check_guides(keyframe_idxs, denoise_mask, size)
            assert denoise_mask is not None
            left = ~(denoise_mask.flatten(2) < 0).any(dim=1)[0]
            found["kept"] = left.nonzero()[:, 0]
            found["kept_frames"] = left[:: math.prod(size[1:])].nonzero()[:, 0]
            of_guides = left[-keyframe_idxs.shape[2] :]
            places = keyframe_idxs[:, :, of_guides].long()  # whole pixels, as ComfyUI has them
            num_guides = places.shape[2]
            before = pixels[:, :, left][:, :, : int(left.sum()) - num_guides]
            pixels = torch.cat((before.expand(len(places), -1, -1, -1), places), dim=2)
            if guides := self._guides(guide_attention_entries, of_guides, pixels.shape[2], video):
                found["guides"] = guides
        elif guide_attention_entries:
            raise InputError(
                f"{self.label} was told how much to look at guides, but not where these are "
                "(keyframe_idxs). Add guides with 'LTXVAddGuide', which sets both."
            )
        if sizes.keyframe_mark:
            marked = pixels[:, 0, :, 0] == 0
            marked[:, pixels.shape[2] - num_guides :] = False
            marked = marked | self._generated(generated_keyframes, size, left)
            mark = self.model.keyframes_abs_pos_embedding
            found["mark"] = marked[..., None].to(video.dtype) * mark
        positions = pixels.float()
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
        for sound in sounds:
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
        if plain := options.get("stg_self_attn_blocks"):
            found["plain"] = tuple(plain)
        if skip := skipped_blocks(options):
            found["skip"] = skip
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
    ) -> list[torch.Tensor]:
        """(B, C, T, H, W), and (B, 8, T', 16) of sound if there is any → the same.

        ``timesteps`` of the video, ``a_timestep`` of the sound: (B,), or (B, L, 1).
        """
        model, (video, *sounds) = self.model, _latents(x)
        per_frame, repeats = math.prod(video.shape[3:]), 1
        times = timesteps.reshape(len(video), -1)
        if by_frame and times.shape[1] % per_frame == 0:
            times, repeats = times[:, ::per_frame], per_frame
            times = times if kept_frames is None else times[:, kept_frames]
        elif kept is not None:
            times = times[:, kept]
        times = times * self.sizes.time_scale
        tokens = video.flatten(2).transpose(1, 2)
        tokens = model.proj_in(tokens if kept is None else tokens[:, kept])
        if mark is not None:
            tokens = tokens + mark
        streams, sound_times = [], None
        for sound in sounds:
            of_sound = timesteps if a_timestep is None else a_timestep
            sound_times = of_sound.reshape(len(sound), -1)
            of_sound = sound.transpose(1, 2).flatten(2)
            if reference is not None:  # which is at time 0
                of_sound = torch.cat((reference, of_sound), dim=1)
                sound_times = sound_times.expand(-1, sound.shape[2])
                before = sound_times.new_zeros(reference.shape[:2])
                sound_times = torch.cat((before, sound_times), dim=1)
            of_sound = model.audio_proj_in(of_sound)
            sound_times = sound_times * self.sizes.time_scale
            sound_pair = rotations[2], rotations[3]
            streams.append(
                self._stream("audio", of_sound, captions[1], sound_pair, sound_times, times)
            )
        of_video = captions[0], (rotations[0], rotations[1]), times, sound_times
        streams.append(self._stream("video", tokens, *of_video, repeats, guides))

        kept_blocks = [
            (number, block)
            for number, block in enumerate(model.transformer_blocks)
            if ("double_block", number) not in skip
        ]
        lasts = [self._last_norm(stream) for stream in streams]

        def norms(place: int) -> list[Norm]:
            if place == len(kept_blocks):
                return lasts
            return [stream.norm(kept_blocks[place][1], BEFORE_ITSELF) for stream in streams]

        for stream, norm in zip(streams, norms(0), strict=True):
            stream.normed = first_norm(stream.tokens, **norm)
        for place, (number, block) in enumerate(kept_blocks):
            shared = mask, directions, number in plain
            self.run_block(block, streams, norms(place + 1), *shared)
        results = [self._video(streams[-1].normed, video.shape, kept)]
        for sound, stream in zip(sounds, streams, strict=False):
            projected = model.audio_proj_out(stream.normed[:, -sound.shape[2] :])
            results.append(projected.unflatten(2, (-1, AUDIO_BINS)).transpose(1, 2))
        return results

    def _stream(
        self,
        which: str,
        tokens: torch.Tensor,
        caption: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        times: torch.Tensor,
        other_times: torch.Tensor | None,
        repeats: int = 1,
        guides: Guides | None = None,
    ) -> Stream:
        """Of tokens before the first block. ``times`` (B, F), and the other stream's."""
        model, sizes, dtype = self.model, self.sizes, tokens.dtype
        prefix, direction = ("", "a2v") if which == "video" else ("audio_", "v2a")
        head_dim = sizes.head_dim if which == "video" else sizes.audio_head_dim
        of_time, last = _modulation(getattr(model, f"{prefix}time_embed"), times, dtype)
        stream = Stream(
            prefix, which, tokens.shape[-1], head_dim, tokens, tokens, of_time, last, repeats,
            caption, rotations, guides,
        )  # fmt: skip
        if sizes.text_modulation:
            module = getattr(model, f"{prefix}prompt_adaln")
            stream.prompt, _ = _modulation(module, times.amax(dim=1, keepdim=True), dtype)
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
        shift, scale = (row_of(table[index:], of_time, 0, stream.repeats) for index in (0, 1))
        return {"norm": "layer", "shift": shift, "scale": scale}

    def _video(
        self, normed: torch.Tensor, shape: torch.Size, kept: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens (B, L, D) as latents of that shape; zero where none was kept."""
        found = self.model.proj_out(normed)
        if kept is not None:
            whole = found.new_zeros(shape[0], math.prod(shape[2:]), found.shape[-1])
            whole[:, kept] = found
            found = whole
        return found.transpose(1, 2).unflatten(2, shape[2:])

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
        heads = self._heads(num_heads, head_dim)
        given = places[None, None], (CAPTION_POSITIONS,), heads, "float64", tokens.dtype
        rotation = rotation_of(*given)
        normed = F.rms_norm(tokens, tokens.shape[-1:], eps=EPS)
        for block in connector.transformer_blocks:
            look = at_itself(block.attn1, num_heads * head_dim, head_dim, normed, rotation)
            (product,) = self.attend([look])
            tokens, normed = self.join([product], tokens, Epilogue(EPS, **NORM))
            tokens, normed = self.join([mlp(block.ff, normed)], tokens, Epilogue(EPS, **NORM))
        return normed

    def _heads(self, num_heads: int, head_dim: int) -> Heads:
        layer = self.model.transformer_blocks[0].attn1.to_qkv
        return Heads(Split(num_heads, head_dim), layer.tp_rank, layer.tp_size)

    def _rotations(
        self, positions: torch.Tensor, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of tokens (B, axes, L, 2): along all axes, and along time, where the streams meet."""
        sizes = self.sizes
        limits = sizes.max_positions if positions.shape[1] > 1 else sizes.audio_max_positions
        meeting = (max(sizes.max_positions[0], sizes.audio_max_positions[0]),)
        given = middle_of(positions, sizes.middle), limits, self._heads(num_heads, head_dim)
        sound = self._heads(sizes.audio_heads, sizes.audio_head_dim)
        along_time = middle_of(positions[:, :1]), meeting, sound
        return (
            rotation_of(*given, sizes.precision, dtype),
            rotation_of(*along_time, sizes.precision, dtype),
        )

    def _check_guides(
        self, places: torch.Tensor, mask: torch.Tensor | None, size: Sequence[int]
    ) -> None:
        """Raises InputError unless guides are frames of the video, which its mask knows."""
        per_frame, count = math.prod(size[1:]), places.shape[2]
        if mask is None:
            raise InputError(
                f"Guides of {self.label} need the mask that 'LTXVAddGuide' puts into the latent. "
                "Give its latent to the sampler, together with its conditioning."
            )
        if count % per_frame or count > math.prod(size):
            raise InputError(
                f"The guides of {self.label} are {count} tokens; they must be whole frames of "
                f"{per_frame} tokens here, at most {size[0]}. They were made for a video of "
                "another size: crop guides ('LTXVCropGuides') before the latent is made larger."
            )

    def _guides(
        self,
        entries: Sequence[Mapping[str, Any]],
        left: torch.Tensor,
        num_tokens: int,
        video: torch.Tensor,
    ) -> Guides | None:
        """How much guides are looked at; None if as much as all else. ``left`` (n,): which of their
        tokens are. Raises InputError.
        """
        counts = [int(entry["pre_filter_count"]) for entry in entries]
        if entries and sum(counts) != len(left):
            raise InputError(
                f"The guides of {self.label} are {len(left)} tokens, but {sum(counts)} by what was "
                "said of how much to look at them. Add every guide with 'LTXVAddGuide'."
            )
        each = zip(entries, left.split(counts) if counts else (), strict=True)
        weights = [guide_weights(entry, int(own.sum()), video) for entry, own in each]
        if not weights or bool((together := torch.cat(weights)).eq(1).all()):
            return None
        return guides_of(together, num_tokens, num_tokens - int(left.sum()))

    def _generated(
        self, keyframes: Mapping[str, int] | None, size: Sequence[int], left: torch.Tensor
    ) -> torch.Tensor:
        """Which tokens, of those that are left, are pictures that the model makes: (L,) bool.

        Raises:
            InputError: they were asked for at another size.
        """
        chosen = torch.zeros_like(left)
        if keyframes is not None:
            per_frame = math.prod(size[1:])
            if keyframes["tokens_per_frame"] != per_frame:
                raise InputError(
                    f"Generated keyframes of {self.label} were made for frames of "
                    f"{keyframes['tokens_per_frame']} tokens; those of this latent are "
                    f"{per_frame}. Separate them before the latent is made larger."
                )
            first = keyframes["first_latent_frame"] * per_frame
            chosen[first : first + keyframes["num_keyframes"] * per_frame] = True
        return chosen[left]


def _latents(x: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else x


def _modulation(
    module: Any, times: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, F, n, D) of timesteps (B, F), and their embedding (B, F, D)."""
    embedded = module.emb.timestep_embedder(timestep_embedding(times, TIME_CHANNELS).to(dtype))
    return module.linear(F.silu(embedded)).unflatten(-1, (-1, embedded.shape[-1])), embedded


def _varies_in_a_frame(mask: torch.Tensor | None) -> bool:
    """Whether a mask (B, C, T, H, W) has more than one value in a frame of its first item."""
    if mask is None:
        return False
    frames = mask[0, 0].flatten(1)
    return bool((frames.amin(dim=1) != frames.amax(dim=1)).any())


def _scores(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of a caption's tokens, 0 or 1, as what is added to scores."""
    if mask.is_floating_point():
        return mask
    of_each = (mask.long() - 1).to(dtype).reshape(len(mask), 1, -1, mask.shape[-1])
    return of_each * torch.finfo(dtype).max
