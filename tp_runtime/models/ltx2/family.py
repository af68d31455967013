"""LTX-2 (2.0, 2.3 and 2.5: video with sound): its files, sizes and split.

Module: diffusers' ``LTX2VideoTransformer3DModel`` (0.42, models/transformers/transformer_ltx2.py)
and the connectors of its text (pipelines/ltx2/connectors.py).
File: ComfyUI's ``LTXAVModel`` (0.33, comfy/ldm/lightricks/av_model.py).

The connectors, which ComfyUI runs over a caption once a generation, are split over the ranks like
the blocks: they are up to a tenth of the model's bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from ...errors import InputError
from ...sharding.parts import Shape
from ...sharding.plan import QKV, Column, MergedColumn, Replicated, Row, Split
from ...sharding.table import (
    IMAGE,
    ITEM,
    PROMPT,
    TEXT,
    Attention,
    Linear,
    Stack,
    Table,
    TableRow,
    Tensor,
)
from .. import family as of
from ..family import Family, Geometry, Input, Sizes, Told, size

TIME_CHANNELS = 256
MLP_RATIO = 4  # of ComfyUI's class, and of its connectors
AUDIO_BINS = 16  # of frequency; each with the channels of an audio latent
AUDIO_CHANNELS = 8
REGISTERS = 128  # learned tokens, which fill up a caption
MIN_CAPTION = 1024  # tokens of a caption that was filled up
_BLOCK, _CONNECTOR = "transformer_blocks.0", "video_embeddings_connector"
_LAYERS = "transformer_1d_blocks"
_GATE = "attn1.to_gate_logits.weight"


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
    connector_blocks: int = size(of.blocks(f"{_CONNECTOR}.{_LAYERS}"), lambda _: 0)
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
    connector_gated: bool = size(of.has(f"{_CONNECTOR}.{_LAYERS}.0.{_GATE}"), lambda _: False)

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
        places = "batch", ("axes", 3), "guide tokens", ("ends", 2)
        channels, bins = ("channels", AUDIO_CHANNELS), ("bins", AUDIO_BINS)
        sound = Input(
            "Latents of sound",
            ("batch", channels, "sound frames", bins),
            "Use 'LTXVEmptyLatentAudio'.",
            optional=True,
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
            "keyframe_idxs": Input("Positions of guides", places, optional=True, kind="any"),
            "denoise_mask": Input("Masks of the video", masks, optional=True, kind="any"),
        }

    def prepared(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same. Raises InputError for timesteps of another number of tokens."""
        x, times = inputs["x"], inputs["timesteps"]
        video = x if isinstance(x, torch.Tensor) else x[0]
        tokens = self.geometry.image_tokens(tuple(video.shape))
        if times.ndim > 1 and times.shape[1] != tokens:
            raise InputError(
                f"A video of {FAMILY.label} of {tokens} tokens has as many timesteps, or one; got "
                f"{times.shape[1]}. The mask of its latent must be of the latent's size."
            )
        return inputs

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
        dim, audio = self.dim, self.audio_dim
        rows = 9 if self.text_modulation else 6
        outside: tuple[TableRow, ...] = (
            Linear("proj_in", "patchify_proj", Replicated(), self.in_channels, dim),
            Linear(
                "audio_proj_in", "audio_patchify_proj", Replicated(), self.audio_channels, audio
            ),
            *_modulation("time_embed", "adaln_single", dim, rows),
            *_modulation("audio_time_embed", "audio_adaln_single", audio, rows),
            *_cross_modulation("video", "scale_shift", "video_scale_shift", dim, 4),
            *_cross_modulation("audio", "scale_shift", "audio_scale_shift", audio, 4),
            *_cross_modulation("video", "a2v_gate", "a2v_gate", dim, 1),
            *_cross_modulation("audio", "v2a_gate", "v2a_gate", audio, 1),
            Tensor("scale_shift_table", "", (2, dim)),
            Tensor("audio_scale_shift_table", "", (2, audio)),
            Linear("proj_out", "", Replicated(), dim, self.in_channels),
            Linear("audio_proj_out", "", Replicated(), audio, self.audio_channels),
        )
        if self.text_modulation:
            outside += (
                *_modulation("prompt_adaln", "prompt_adaln_single", dim, 2),
                *_modulation("audio_prompt_adaln", "audio_prompt_adaln_single", audio, 2),
            )
        if self.projects:
            for name, width in (("caption_projection", dim), ("audio_caption_projection", audio)):
                outside += (
                    Linear(f"{name}.linear_1", "", Column(), self.caption_channels, width),
                    Linear(f"{name}.linear_2", "", Row(), width, width),
                )
        if self.keyframe_mark:
            outside += (Tensor("keyframes_abs_pos_embedding", "", (1, dim)),)
        attentions = (
            Attention(Split(self.num_heads, self.head_dim), IMAGE, IMAGE),
            Attention(Split(self.num_heads, self.head_dim), IMAGE, TEXT),
        )
        name = "transformer_blocks"
        blocks = Stack(name, name, self.num_blocks, tuple(self._block()), attentions)
        stacks = [blocks]
        for which, heads, head_dim in self.connectors:
            path, width = f"{which}_embeddings_connector", heads * head_dim
            outside += (Tensor(f"{path}.learnable_registers", "", (REGISTERS, width)),)
            layer = (
                *_attention("attn1", heads, head_dim, width, self.connector_gated, PROMPT),
                *_feed_forward("ff", width, True, PROMPT),
            )
            ours, file = f"{path}.transformer_blocks", f"{path}.{_LAYERS}"
            stacks.append(Stack(ours, file, self.connector_blocks, layer))
        return Table(outside, tuple(stacks))

    def _block(self) -> Iterator[TableRow]:
        """Few tokens are sound: in costs, its linears count as those of one row."""
        dim, audio, gated = self.dim, self.audio_dim, self.gated
        heads = self.num_heads, self.head_dim
        audio_heads = self.audio_heads, self.audio_head_dim
        yield from _attention("attn1", *heads, dim, gated, IMAGE)
        yield from _attention("attn2", *heads, dim, gated, IMAGE, dim, TEXT)
        yield from _attention("audio_attn1", *audio_heads, audio, gated, ITEM)
        yield from _attention("audio_attn2", *audio_heads, audio, gated, ITEM, audio, TEXT)
        # Named by what is given: sound to the video, whose queries these are.
        yield from _attention("audio_to_video_attn", *audio_heads, dim, gated, IMAGE, audio, ITEM)
        yield from _attention("video_to_audio_attn", *audio_heads, audio, gated, ITEM, dim, IMAGE)
        yield from _feed_forward("ff", dim, self.ff_bias, IMAGE)
        yield from _feed_forward("audio_ff", audio, self.audio_ff_bias, ITEM)
        rows = 9 if self.text_modulation else 6
        cross = "a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca"
        for prefix, width, which in (("", dim, "video"), ("audio_", audio, "audio")):
            yield Tensor(f"{prefix}scale_shift_table", "", (rows, width))
            yield Tensor(f"{which}_{cross[0]}", f"{cross[1]}_{which}", (5, width))
            if self.text_modulation:
                yield Tensor(f"{prefix}prompt_scale_shift_table", "", (2, width))


def _modulation(ours: str, file: str, dim: int, rows: int) -> Iterator[Linear]:
    """What makes ``rows`` rows of a timestep."""
    path = "emb.timestep_embedder.linear"
    yield Linear(f"{ours}.{path}_1", f"{file}.{path}_1", Column(), TIME_CHANNELS, dim)
    yield Linear(f"{ours}.{path}_2", f"{file}.{path}_2", Row(), dim, dim)
    yield Linear(f"{ours}.linear", f"{file}.linear", Column(gather=True), dim, rows * dim)


def _cross_modulation(which: str, kind: str, file: str, dim: int, rows: int) -> Iterator[Linear]:
    ours = f"av_cross_attn_{which}_{kind}"
    return _modulation(ours, f"av_ca_{file}_adaln_single", dim, rows)


def _attention(
    path: str,
    num_heads: int,
    head_dim: int,
    width: int,
    gated: bool,
    over: str,
    of_keys: int = 0,
    over_keys: str = "",
) -> Iterator[TableRow]:
    """Of tokens ``width`` wide to themselves, or to others ``of_keys`` wide."""
    heads, inner = Split(num_heads, head_dim), num_heads * head_dim
    if of_keys:
        both = MergedColumn("to_kv", (head_dim, head_dim))
        yield Linear(f"{path}.to_q", "", Column((heads,)), width, inner, over)
        yield Linear(f"{path}.{{to_k,to_v}}", "", both, of_keys, 2 * (inner,), over_keys)
    else:
        qkv = QKV("to_qkv", head_dim, num_heads, num_heads)
        yield Linear(f"{path}.{{to_q,to_k,to_v}}", "", qkv, width, 3 * (inner,), over)
    yield Linear(f"{path}.to_out.0", "", Row((heads,)), inner, width, over)
    yield Tensor(f"{path}.norm_{{q,k}}.weight", f"{path}.{{q,k}}_norm.weight", (inner,), heads)
    if gated:
        split = Column((Split(num_heads),))
        yield Linear(f"{path}.to_gate_logits", "", split, width, num_heads, over)


def _feed_forward(path: str, width: int, bias: bool, over: str) -> Iterator[Linear]:
    hidden = MLP_RATIO * width
    yield Linear(f"{path}.net.0.proj", "", Column(), width, hidden, over, bias)
    yield Linear(f"{path}.net.2", "", Row(), hidden, width, over, bias)


FAMILY = Family(
    name="ltx2",
    label="LTX-2",
    models=("2.3", "2.5"),
    sizes=LTX2Sizes,
    signature=("audio_adaln_single.linear.weight", "av_ca_a2v_gate_adaln_single.linear.weight"),
    diffusers_class="LTX2VideoTransformer3DModel",
    published=LTX2Sizes(
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
    ),
    small=LTX2Sizes(
        num_heads=8,
        head_dim=16,
        audio_heads=8,
        audio_head_dim=8,
        num_blocks=2,
        in_channels=128,
        audio_channels=128,
        caption_channels=96,
        text_modulation=True,
        gated=True,
        ff_bias=False,
        audio_ff_bias=True,
        projects=False,
        keyframe_mark=True,
        connector_blocks=2,
        connector_heads=8,
        connector_head_dim=16,
        audio_connector_heads=8,
        audio_connector_head_dim=8,
        connector_gated=True,
        rope_type="split",
        precision="float64",
        middle=True,
        causal=True,
        max_positions=(20, 2048, 2048),
        audio_max_positions=(20,),
        time_scale=1000.0,
        cross_time_scale=1000.0,
    ),
    connects="preprocess_text_embeds",
    text_tokens=MIN_CAPTION,
    extents=((960, 544, 121), (1920, 1088, 121)),
)
