"""MiniMax H3 (FL2VA, Ref2VA; pruned and full files): its files, sizes and split.

Module: diffusers' ``MiniMaxH3Transformer3DModel`` (0.42, models/transformers/
transformer_minimax_h3.py). File: ComfyUI's ``MiniMaxH3Model`` (0.33, comfy/ldm/minimax/model.py).
Rows of ``qkv_proj`` are q, then k, then v, as in every single file that is published, and as
ComfyUI takes them; in MiniMaxAI's own shards they lie head by head, which no file says of itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from ...sharding.parts import Shape
from ...sharding.plan import Column, Row, Split
from ...sharding.table import (
    ALL,
    ITEM,
    PROMPT,
    Attention,
    Linear,
    Stack,
    Table,
    TableRow,
    Tensor,
)
from .. import family as of
from ..family import Family, Geometry, Input, Settings, Sizes, size
from ..rows import attention
from .payload import AUDIO_SHIFT, PATCH, SIDES, VIDEO_SHIFT, frames_of, prepared

EPS = 1e-5
# Settings that show in no shape.
_COMPUTED = {
    "norm_eps": EPS,
    "qk_norm_eps": EPS,
    "final_norm_eps": EPS,
    "patch_size": list(PATCH),
}
MODALITIES = 3  # video, text, audio: each has its own modulation
_TABLE = "adaln_t_table"
_HEAD = "blocks.0.attn.q_norm.weight"


@dataclass(frozen=True)
class AudioVideoGeometry(Geometry):
    """Of 17 frames of a video five latents are made, of one frame and of four times four."""

    def latent_shape(self, width: int, height: int, frames: int = 1) -> Shape:
        length = 1
        while frames_of(length) < frames:
            length += 1
        return self.channels, length, height // self.downscale, width // self.downscale

    def image_tokens(self, latent_shape: Shape) -> int:
        """Of the video, and of the sound that belongs to it: 40 latents a second, on two sides."""
        return super().image_tokens(latent_shape) + SIDES * round(
            frames_of(latent_shape[-3]) * 5 / 3
        )


@dataclass(frozen=True)
class MiniMaxH3Sizes(Sizes):
    """``width``: of the model, which is less than that of all heads. ``time_dim``: of what
    modulation is computed from; in pruned files of a row of a table, which has ``grid`` of them for
    times from 0 to 1, in full ones of what an MLP (``time_channels``, ``time_hidden``) makes.
    """

    plain_inputs, unused_inputs = ("minimax_payload",), ("minimax_payload.layout",)
    num_heads: int = size(
        lambda s: s["blocks.0.attn.qkv_proj.weight"][0] // (3 * s[_HEAD][0]), "num_attention_heads"
    )
    head_dim: int = size(of.length(_HEAD), "attention_head_dim")
    width: int = size(of.length("video_patch_proj.weight"), "hidden_size")
    mlp_dim: int = size(of.length("blocks.0.mlp.fc1.weight", per=2), "ffn_dim")
    num_blocks: int = size(of.blocks("blocks"), "num_layers")
    num_refiners: int = size(of.blocks("token_refiner.blocks"), "num_refiner_layers")
    in_channels: int = size(of.length("video_patch_proj.weight", 1, per=4), "in_channels")
    audio_channels: int = size(of.length("audio_patch_proj.weight", 1), "audio_in_channels")
    context_dim: int = size(of.length("condition_proj.weight", 1), "text_dim")
    frequencies: int = size(of.length("rope.inv_freq"), "rope_freq_dim")
    time_dim: int = size(
        lambda s: s[_TABLE][1] if _TABLE in s else s["time_embedder.proj_out.weight"][0],
        "time_embed_dim",
    )
    grid: int | None = size(of.length_if_present(_TABLE, 0), lambda _: None)
    time_channels: int | None = size(
        of.length_if_present("time_embedder.proj_in.weight", 1), lambda s: s["freq_dim"]
    )
    time_hidden: int | None = size(
        of.length_if_present("time_embedder.proj_in.weight", 0),
        lambda s: s["time_embed_hidden_dim"],
    )

    to_diffusers: ClassVar = "freq_dim=time_channels time_embed_hidden_dim=time_hidden"

    @property
    def dim(self) -> int:
        return self.width

    def for_diffusers(self) -> dict[str, Any]:
        # A pruned file's model is built with an MLP for times, which its table then replaces.
        return {name: value or 1 for name, value in super().for_diffusers().items()}

    @property
    def geometry(self) -> Geometry:
        return AudioVideoGeometry(self.in_channels, video=True, downscale=16, patch=PATCH)

    @property
    def inputs(self) -> dict[str, Input]:
        one = ("batch", ("channels", 1))
        sides = ("sides", SIDES), "samples"
        advice = "Use 'Empty MiniMax H3 Latent AV'."
        axes = ("batch", ("channels", self.audio_channels), *sides)
        audio = Input("Audio latents", axes, advice, usual={"samples": 207})
        return {
            "x": replace(self.geometry.latents(), advice=advice, besides=(audio,)),
            "context": of.captions(self.context_dim),
            "denoise_mask": Input(
                "Denoise masks", (*one, "frames", "height", "width"), optional=True, kind="mask"
            ),
            "audio_denoise_mask": Input(
                "Audio denoise masks", (*one, *sides), optional=True, kind="mask"
            ),
        }

    def check_settings(self, settings: Settings) -> None:
        # ComfyUI's class takes what is said there (comfy/model_detection.py).
        for name, value in _COMPUTED.items():
            if settings.get(name, value) != value:
                raise ValueError(f"its metadata sets {name} to {settings[name]}, not to {value}")

    def prepared(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return prepared(inputs, self.in_channels, self.audio_channels)

    @cached_property
    def table(self) -> Table:
        dim, times = self.dim, self.time_dim
        outside: tuple[TableRow, ...] = (
            *_exact("proj_in", "video_patch_proj", 4 * self.in_channels, dim),
            *_exact("audio_proj_in", "audio_patch_proj", self.audio_channels, dim),
            Linear("context_embedder", "condition_proj", _GATHERED, self.context_dim, dim),
            Tensor("rope.inv_freq", "", (self.frequencies,), exact=True),
            Tensor("token_refiner.final_norm.weight", "", (dim,)),
            Tensor("norm_out.norm.weight", "final_layer.norm.weight", (dim,)),
            *self._modulation("norm_out.linear", "final_layer.adaln_proj.linear", 2 * dim),
            *_exact("proj_out", "final_layer.video_out", dim, 4 * self.in_channels),
            *_exact("audio_proj_out", "final_layer.audio_out", dim, self.audio_channels),
        )
        if self.grid is not None:
            outside += (Tensor(_TABLE, "", (self.grid, times), exact=True),)
        elif self.time_channels is not None and self.time_hidden is not None:
            path = "time_embedder"
            outside += _exact(
                f"{path}.linear_1", f"{path}.proj_in", self.time_channels, self.time_hidden
            )
            outside += _exact(f"{path}.linear_2", f"{path}.proj_out", self.time_hidden, times)
        heads, mlp = Split(self.num_heads, self.head_dim), Split(self.mlp_dim)

        def block(over: str) -> tuple[TableRow, ...]:
            up, down = ("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2")
            return (
                *attention(
                    "attn", heads, dim, ("attn.qkv_proj", "attn.out_proj"), over, bias=False
                ),
                Linear(
                    *up, Column((mlp, mlp)), dim, 2 * self.mlp_dim, over, bias=False, swapped=True
                ),
                Linear(*down, Row(), self.mlp_dim, dim, over, bias=False),
                Tensor("attn.norm_{q,k}.weight", "attn.{q,k}_norm.weight", (self.head_dim,)),
                Tensor("norm{1,2}.weight", "norm{1,2}.weight", (dim,)),
            )

        name, rows = "adaln_proj.linear", 6 * MODALITIES * dim
        blocks = *block(ALL), *self._modulation(name, name, rows)
        refiners = "token_refiner.refiner_blocks", "token_refiner.blocks"
        return Table(
            outside,
            (
                Stack(*refiners, self.num_refiners, block(PROMPT)),
                Stack("transformer_blocks", "blocks", self.num_blocks, blocks, (Attention(heads),)),
            ),
        )

    def _modulation(self, ours: str, file: str, outputs: int) -> tuple[TableRow, ...]:
        """A linear of a few rows; pruned files have it in fp32, and little of it."""
        if self.grid is not None:
            return _exact(ours, file, self.time_dim, outputs)
        return (Linear(ours, file, _GATHERED, self.time_dim, outputs, ITEM),)


_GATHERED = Column(gather=True)


def _exact(ours: str, file: str, inputs: int, outputs: int) -> tuple[Tensor, ...]:
    """A linear that every rank has, and computes in fp32."""
    weight = Tensor(f"{ours}.weight", f"{file}.weight", (outputs, inputs), exact=True)
    return weight, Tensor(f"{ours}.bias", f"{file}.bias", (outputs,), exact=True)


FAMILY = Family(
    name="minimax_h3",
    label="MiniMax H3",
    models=("FL2VA", "Ref2VA"),
    sizes=MiniMaxH3Sizes,
    signature=("video_patch_proj.weight", "audio_patch_proj.weight"),
    diffusers_class="MiniMaxH3Transformer3DModel",
    published=MiniMaxH3Sizes(56, 128, 5376, 14336, 50, 2, 24, 32, 5120, 16, 2688, None, 256, 5376),
    small=MiniMaxH3Sizes(8, 32, 192, 256, 2, 1, 24, 32, 64, 4, 16, 9, None, None),
    variants={
        "blocks.0.attn.to_gate_compress.weight": "MiniMax H3 with sparse attention (FastH3)",
        # Which has no frequencies of the rotation; files of ComfyUI's are read for them.
        "num_refiner_layers": "MiniMax H3 as a diffusers folder",
    },
    newer={"video_patch_proj.weight": ("MiniMax H3", "0.33")},
    left_to_ranks=("preprocess_text_embeds",),
    numbers={VIDEO_SHIFT: "sigma_shift_video", AUDIO_SHIFT: "sigma_shift_audio"},
    text_tokens=300,
    extents=((832, 480, 124), (1344, 768, 124)),
    shares_tokens=True,
)
