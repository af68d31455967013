"""LTX-2 (2.0, 2.3 and 2.5: video with sound): its files, sizes and split.

Module: diffusers' ``LTX2VideoTransformer3DModel`` (0.42, models/transformers/transformer_ltx2.py)
and the connectors of its text (pipelines/ltx2/connectors.py).
File: ComfyUI's ``LTXAVModel`` (0.33, comfy/ldm/lightricks/av_model.py).

The connectors, which ComfyUI runs over a caption once a generation, are split over the ranks like
the blocks: they are up to a tenth of the model's bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from ...errors import InputError
from ...sharding.parts import Shape
from ...sharding.table import Table
from .. import family as of
from ..family import AtLeast, Family, Geometry, Input, Sizes, Told, size
from .rows import LAYERS, REGISTERS, table_of

AUDIO_BINS = 16  # of frequency; each with the channels of an audio latent
AUDIO_CHANNELS = 8
MIN_CAPTION = 1024  # tokens of a caption that was filled up
_BLOCK, _CONNECTOR = "transformer_blocks.0", "video_embeddings_connector"
_GATE = "attn1.to_gate_logits.weight"
_PLACES = "keyframe_idxs"  # of guides


@dataclass(frozen=True)
class LTX2Sizes(Sizes):
    """``audio_*``: of the stream of sound. ``connector_*``: of what makes a caption ready.

    ``text_modulation``: captions are modulated by the timestep (2.3). ``projects``: a caption is
    projected in here, not before the connectors (2.0). ``keyframe_mark``: added to tokens that are
    one picture each (2.5). ``rope_type`` and the fields below it no shape tells.
    """

    to_diffusers: ClassVar = (
        "audio_gated_attn=gated audio_cross_attn_mod=text_modulation cross_attention_dim=dim "
        "audio_cross_attention_dim=audio_dim out_channels=in_channels "
        "audio_out_channels=audio_channels"
    )
    to_comfyui: ClassVar = (
        "cross_attention_dim=dim audio_cross_attention_dim=audio_dim ff_bias audio_ff_bias "
        "cross_attention_adaln=text_modulation apply_gated_attention=gated "
        "caption_proj_before_connector=takes_projected caption_projection_first_linear=projects "
        "connector_num_layers=connector_blocks connector_apply_gated_attention=connector_gated"
    )
    plain_options = "a2v_cross_attn", "v2a_cross_attn", "stg_self_attn_blocks"
    plain_inputs = "frame_rate", "guide_attention_entries", "ref_audio", "generated_keyframes"
    unused_inputs = ("audio_denoise_mask",)
    undivided_inputs = ("denoise_mask",)
    num_heads: int = size(Told("num_attention_heads", 32), "num_attention_heads")
    head_dim: int = size(
        Told("attention_head_dim", of.length(f"{_BLOCK}.attn2.to_k.weight", per=32)),
        "attention_head_dim",
    )
    audio_heads: int = size(Told("audio_num_attention_heads", 32), "audio_num_attention_heads")
    audio_head_dim: int = size(Told("audio_attention_head_dim", 64), "audio_attention_head_dim")
    num_blocks: int = size(of.blocks("transformer_blocks"), "num_layers")
    in_channels: int = size(of.length("patchify_proj.weight", 1), "in_channels")
    audio_channels: int = size(of.length("audio_patchify_proj.weight", 1), "audio_in_channels")
    caption_channels: int = size(Told("caption_channels", 3840), "caption_channels")
    text_modulation: bool = size(of.has(f"{_BLOCK}.prompt_scale_shift_table"), "cross_attn_mod")
    gated: bool = size(of.has(f"{_BLOCK}.{_GATE}"), "gated_attn")
    ff_bias: bool = size(of.has(f"{_BLOCK}.ff.net.2.bias"), "ff_bias", absent=True)
    audio_ff_bias: bool = size(
        of.has(f"{_BLOCK}.audio_ff.net.2.bias"), "audio_ff_bias", absent=True
    )
    projects: bool = size(of.has("caption_projection.linear_1.weight"), "use_prompt_embeddings")
    keyframe_mark: bool = size(
        of.has("keyframes_abs_pos_embedding"), "use_keyframes_abs_pos_embedding", absent=False
    )
    connector_blocks: int = size(of.blocks(f"{_CONNECTOR}.{LAYERS}"), lambda _: 0)
    connector_heads: int = size(Told("connector_num_attention_heads", 30), lambda _: 30)
    connector_head_dim: int = size(Told("connector_attention_head_dim", 128), lambda _: 128)
    audio_connector_heads: int = size(
        Told("audio_connector_num_attention_heads", Told("connector_num_attention_heads", 30)),
        lambda _: 30,
    )
    audio_connector_head_dim: int = size(
        Told("audio_connector_attention_head_dim", Told("connector_attention_head_dim", 128)),
        lambda _: 128,
    )
    connector_gated: bool = size(of.has(f"{_CONNECTOR}.{LAYERS}.0.{_GATE}"), lambda _: False)

    rope_type: str = size(Told("rope_type"), "rope_type")
    precision: str = size(
        Told("frequencies_precision", "float32"),
        lambda s: "float64" if s["rope_double_precision"] else "float32",
    )
    middle: bool = size(Told("use_middle_indices_grid", False), lambda _: True)
    causal: bool = size(
        Told("causal_temporal_positioning", False), lambda s: s["causal_offset"] > 0
    )
    max_positions: tuple[float, ...] = size(
        Told("positional_embedding_max_pos", (20, 2048, 2048)),
        lambda s: (s["pos_embed_max_pos"], s["base_height"], s["base_width"]),
    )
    audio_max_positions: tuple[float, ...] = size(
        Told("audio_positional_embedding_max_pos", (20,)), lambda s: (s["audio_pos_embed_max_pos"],)
    )
    time_scale: float = size(Told("timestep_scale_multiplier", 1000.0), "timestep_scale_multiplier")
    cross_time_scale: float = size(
        Told("av_ca_timestep_scale_multiplier", 1.0), "cross_attn_timestep_scale_multiplier"
    )

    @property
    def audio_dim(self) -> int:
        """Width of the stream of sound."""
        return self.audio_heads * self.audio_head_dim

    @property
    def takes_projected(self) -> bool:
        """Whether the text encoder has projected a caption for each stream."""
        return not self.projects

    @property
    def connectors(self) -> tuple[tuple[str, int, int], ...]:
        """Stream, heads and width of a head of each connector."""
        if not self.connector_blocks:
            return ()
        of_sound = "audio", self.audio_connector_heads, self.audio_connector_head_dim
        return ("video", self.connector_heads, self.connector_head_dim), of_sound

    @property
    def caption_dims(self) -> tuple[int, int]:
        """Features of a caption that is ready, for video and for sound, which lie side by side."""
        return 2 * (self.caption_channels,) if self.projects else (self.dim, self.audio_dim)

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            self.in_channels, video=True, downscale=32, frames_per_latent=8, patch=(1, 1, 1)
        )

    @property
    def inputs(self) -> dict[str, Input]:
        masks = "batch", "mask channels", "frames", "height", "width"
        places = "batch", ("axes", 3), AtLeast("guide tokens", 0), ("ends", 2)
        channels, bins = ("channels", AUDIO_CHANNELS), ("bins", AUDIO_BINS)
        sound = Input(
            "Latents of sound",
            ("batch", channels, "sound frames", bins),
            "Use 'LTXVEmptyLatentAudio'.",
            optional=True,
            usual={"sound frames": 126},  # of 121 frames, 24 a second
        )
        of_video, of_sound = (("batch", name, ("one", 1)) for name in ("tokens", "sound frames"))
        times = replace(of.TIMESTEPS, or_axes=of_video)
        sound_times = Input("Timesteps of sound", ("batch",), or_axes=of_sound, kind="number")
        return {
            "x": replace(self.geometry.latents(), besides=(sound,)),
            "timesteps": times,
            "a_timestep": replace(sound_times, optional=True),
            "context": of.captions(sum(self.caption_dims)),
            "attention_mask": replace(of.MASKS, kind="any"),
            _PLACES: Input("Positions of guides", places, optional=True, kind="any"),
            "denoise_mask": Input("Masks of the video", masks, optional=True, kind="any"),
        }

    def prepared(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same, but for positions of no guides, as context windows without any have them.

        Where tokens have timesteps, with ``latest_times`` (1,) of the video and of its sound, over
        all items: what a stream takes of the other is gated by its latest time of the whole batch.

        Raises:
            InputError: timesteps of another number of tokens.
        """
        x, times = inputs["x"], inputs["timesteps"]
        video = x if isinstance(x, torch.Tensor) else x[0]
        tokens = self.geometry.image_tokens(tuple(video.shape))
        if times.ndim > 1 and times.shape[1] != tokens:
            raise InputError(
                f"A video of {FAMILY.label} of {tokens} tokens has as many timesteps, or one; got "
                f"{times.shape[1]}. The mask of its latent must be of the latent's size."
            )
        found = dict(inputs)
        of_both = times, inputs.get("a_timestep", times)
        if len(video) > 1 and any(one.ndim > 1 for one in of_both):
            found["latest_times"] = [one.amax().reshape(1) for one in of_both]
        places = inputs.get(_PLACES)
        if places is not None and not places.shape[2]:
            del found[_PLACES]
        return found

    def connected(self, caption: Shape, *, unprocessed: bool) -> Shape | None:
        """See ``Sizes``; ComfyUI's ``LTXAVModel.preprocess_text_embeds`` decides so (0.33)."""
        batch, length, width = caption
        of_streams = self.dim, self.audio_dim
        if not unprocessed and width in (sum(of_streams), 2 * self.caption_channels):
            return None
        widths = [heads * head_dim for _, heads, head_dim in self.connectors]
        if not widths:
            raise InputError(
                f"This {FAMILY.label} file has no connectors, and the captions are not ready "
                f"(their width is {width}). Take a file that has them (its tensors "
                "'video_embeddings_connector…'), or a text encoder file that has."
            )
        if width != sum(of_streams) and {width} != set(widths):
            usual = sum(of_streams) if self.takes_projected else widths[0]
            raise InputError(
                f"Captions of {FAMILY.label} have the width {usual}; got {width}. Use the text "
                "encoder that belongs to the model."
            )
        return batch, -(-max(MIN_CAPTION, length) // REGISTERS) * REGISTERS, sum(widths)

    @cached_property
    def table(self) -> Table:
        return table_of(self)


_PUBLISHED = LTX2Sizes(
    num_heads=32,
    head_dim=128,
    audio_heads=32,
    audio_head_dim=64,
    num_blocks=48,
    in_channels=128,
    audio_channels=128,
    caption_channels=3840,
    text_modulation=True,
    gated=True,
    ff_bias=False,
    audio_ff_bias=True,
    projects=False,
    keyframe_mark=True,
    connector_blocks=8,
    connector_heads=32,
    connector_head_dim=128,
    audio_connector_heads=32,
    audio_connector_head_dim=64,
    connector_gated=True,
    rope_type="split",
    precision="float64",
    middle=True,
    causal=True,
    max_positions=(20, 2048, 2048),
    audio_max_positions=(20,),
    time_scale=1000.0,
    cross_time_scale=1000.0,
)  # 2.5
FAMILY = Family(
    name="ltx2",
    label="LTX-2",
    models=("2.0", "2.3", "2.5"),
    sizes=LTX2Sizes,
    signature=("audio_adaln_single.linear.weight", "av_ca_a2v_gate_adaln_single.linear.weight"),
    diffusers_class="LTX2VideoTransformer3DModel",
    published=_PUBLISHED,
    small=replace(
        _PUBLISHED,
        num_heads=8,
        head_dim=16,
        audio_heads=8,
        audio_head_dim=8,
        num_blocks=2,
        caption_channels=96,
        connector_blocks=2,
        connector_heads=8,
        connector_head_dim=16,
        audio_connector_heads=8,
        audio_connector_head_dim=8,
    ),
    newer={"audio_adaln_single.linear.weight": ("LTX-2", "0.33")},
    connects="preprocess_text_embeds",
    shares_tokens=True,
    text_tokens=MIN_CAPTION,
    extents=((960, 544, 121), (1920, 1088, 121)),
)
