"""Wan 2.1 and 2.2 (text and image to video, 5B, VACE, Fun, SCAIL, Animate): its files and sizes.

Module: diffusers' ``WanTransformer3DModel`` (0.42, models/transformers/transformer_wan.py).
File: ComfyUI's ``WanModel`` (0.3.75, and 0.33 for SCAIL; comfy/ldm/wan/model.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

from ...errors import InputError
from ...sharding.plan import Column, MergedColumn, Replicated, Row, Split
from ...sharding.table import IMAGE, PROMPT, TEXT, Attention, Linear, Stack, Table, TableRow, Tensor
from .. import family as of
from ..family import Family, Geometry, Input, Shapes, Sizes, size
from ..rows import TIME_CHANNELS, attention, mlp
from . import rows as animate
from .rows import PATCH

CAMERA_DOWNSCALE = 8  # pixels of a camera's path along a side of a latent's
_WIDTH = "head.modulation"
_POSE, _MASKS = "patch_embedding_pose", "patch_embedding_mask"
_FEATURES = {"clip_fea", "clip_fea_pose"}
_OF_VARIANTS = "clip_fea", "reference_latent", "vace_context", "camera_conditions"
_FACES = "face_adapter.fuser_blocks.0.k_norm.weight"
_STRENGTHS = "vace_strength", "pose_strength", "reference_strength"
# What ComfyUI's class of Wan Animate 2 does not look at, or only to keep what is kept here anyway.
_NOT_WITH_POSES = "time_dim_concat", "context_latents", "animate2_cache", "context_window"
_VACE, _CAMERA, _OUTSIDE = "vace_patch_embedding", "control_adapter", "condition_embedder"


def _head_dim(shapes: Shapes) -> int:
    """128 in every published model, which the file does not say; 16 in narrower ones, for tests."""
    return 16 if shapes[_WIDTH][2] % 128 else 128


# ComfyUI's class for VACE looks at no pictures: what such a file has for them is left out.
_of_clip = partial(of.length_if_present, axis=1, unless=f"{_VACE}.weight")


@dataclass(frozen=True)
class WanSizes(Sizes):
    """``image_dim``: of the CLIP features that a model looks at. ``image_positions``: how many of
    them have a learned position (first and last frame). ``reference_channels``: of the picture that
    goes before the first frame (Fun Control). ``vace_channels``: of control videos, which go
    through ``vace_blocks`` of their own. ``camera_channels``: of a camera's path (Fun Camera).
    ``pose_channels``: of a video of poses (SCAIL), and ``mask_channels`` of masks that say who is
    who (SCAIL-2). None where a model has no such input. ``has_faces``: it looks at a video of poses
    and at one of a face (Wan Animate). ``poses_pass``: a video of poses passes through the blocks,
    too (Wan Animate 2), which only the file's metadata tell.
    """

    to_diffusers: ClassVar = "image_dim added_kv_proj_dim pos_embed_seq_len=image_positions"
    to_comfyui: ClassVar = "num_heads text_dim=context_dim"
    plain_inputs, options = (*_STRENGTHS, "ref_mask_flag"), ("rope_options",)
    num_heads: int = size(lambda s: s[_WIDTH][2] // _head_dim(s), "num_attention_heads")
    head_dim: int = size(_head_dim, "attention_head_dim")
    mlp_dim: int = size(of.length("blocks.0.ffn.0.weight"), "ffn_dim")
    num_blocks: int = size(of.blocks("blocks"), "num_layers")
    in_channels: int = size(of.length("patch_embedding.weight", 1), "in_channels")
    out_channels: int = size(of.length("head.head.weight", per=4), "out_channels")
    context_dim: int = size(of.length("text_embedding.0.weight", 1), "text_dim")
    image_dim: int | None = size(_of_clip("img_emb.proj.1.weight"), lambda s: s.get("image_dim"))
    image_positions: int | None = size(
        _of_clip("img_emb.emb_pos"), lambda s: s.get("pos_embed_seq_len")
    )
    reference_channels: int | None = size(
        of.length_if_present("ref_conv.weight", 1), lambda _: None
    )

    vace_blocks: int = size(of.blocks("vace_blocks"), lambda _: 0)
    vace_channels: int | None = size(of.length_if_present(f"{_VACE}.weight", 1), lambda _: None)
    camera_channels: int | None = size(
        of.length_if_present(f"{_CAMERA}.conv.weight", 1, per=CAMERA_DOWNSCALE**2), lambda _: None
    )
    pose_channels: int | None = size(of.length_if_present(f"{_POSE}.weight", 1), lambda _: None)
    mask_channels: int | None = size(of.length_if_present(f"{_MASKS}.weight", 1), lambda _: None)
    has_faces: bool = size(of.has(_FACES), lambda _: False)
    poses_pass: bool = size(of.Told("model_type", equals="animate2"), lambda _: False)

    @property
    def added_kv_proj_dim(self) -> int | None:
        """Width of CLIP's features in the blocks: the model's, where it takes any."""
        return self.dim if self.image_dim else None

    @property
    def axes_dims(self) -> tuple[int, ...]:
        """Features of a head that turn with frame, row and column: 44, 42, 42 of 128."""
        along = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * along, along, along

    @cached_property
    def unused_inputs(self) -> tuple[str, ...]:
        """Those of other models: `WanImageToVideo` sets CLIP features for every model."""
        found = tuple(name for name in _OF_VARIANTS if name not in self.inputs)
        return (*found, *_NOT_WITH_POSES) if self.poses_pass else found

    @property
    def geometry(self) -> Geometry:
        downscale = 16 if self.out_channels == 48 else 8  # 48 channels: the autoencoder of Wan 2.2
        return Geometry(
            self.in_channels, self.out_channels, video=True, downscale=downscale, patch=PATCH
        )

    @property
    def inputs(self) -> dict[str, Input]:
        times = of.TIMESTEPS
        if not self.vace_channels and not self.camera_channels:
            times = replace(times, or_axes=("batch", "times"))
        more = ("batch", ("channels", self.in_channels), "more frames", "height", "width")
        found = {
            "timesteps": times,
            "context": of.captions(self.context_dim),
            "time_dim_concat": Input("Latents of more frames", more, optional=True),
        }
        own = self.vace_channels, self.camera_channels, self.pose_channels, self.has_faces
        if not any(own):
            others = "batch", ("channels", self.in_channels), "other frames", "rows", "columns"
            found["context_latents"] = Input(
                "Context latents", others, optional=True, many=True, usual={"other frames": 1}
            )
        if self.image_dim:
            axes = ("batch", "patches", ("width", self.image_dim))
            advice = "Use the CLIP vision model that belongs to the model."
            found["clip_fea"] = Input(
                "CLIP vision features", axes, advice, optional=True, usual={"patches": 257}
            )
        if self.reference_channels:
            picture = ("batch", ("channels", self.reference_channels), "rows", "columns")
            found["reference_latent"] = Input("Reference latents", picture, optional=True)
        if self.pose_channels:
            found |= self._of_poses(self.pose_channels)
        if self.has_faces:
            found |= self._of_faces()
        if self.poses_pass:
            found |= self._of_passing_poses()
            found = {name: one for name, one in found.items() if name not in _NOT_WITH_POSES}
        if self.vace_channels:
            size_of = ("channels", self.vace_channels), "control frames", "rows", "columns"
            found["vace_context"] = Input("Control videos", ("batch", "videos", *size_of))
        if self.camera_channels:
            path = (
                ("channels", self.camera_channels),
                "camera frames",
                "pixel rows",
                "pixel columns",
            )
            found["camera_conditions"] = Input("Camera paths", ("batch", *path), optional=True)
        return found

    def _of_poses(self, channels: int) -> dict[str, Input]:
        """What SCAIL looks at: people in pictures, before the first frame, and how they move."""
        moving = "pose frames", "pose rows", "pose columns"
        pictures = ("channels", self.in_channels), "pictures", "height", "width"
        found = {
            "reference_latent": Input("Reference latents", ("batch", *pictures), optional=True),
            "pose_latents": Input(
                "Latents of poses", ("batch", ("channels", channels), *moving), optional=True
            ),
        }
        if self.mask_channels:
            masks = "batch", ("channels", self.mask_channels)
            of_all = *masks, "masked frames", "height", "width"
            found["ref_mask_latents"] = Input("Masks of references", of_all, optional=True)
            found["sam_latents"] = Input("Masks of poses", (*masks, *moving), optional=True)
        return found

    def _of_faces(self) -> dict[str, Input]:
        """What Wan Animate looks at: how a body moves, and a face."""
        poses = ("channels", animate.POSE_CHANNELS), "pose frames", "height", "width"
        pixels = ("pixel rows", animate.FACE_SIDE), ("pixel columns", animate.FACE_SIDE)
        faces = ("batch", ("channels", 3), "face frames", *pixels)
        advice = "Set them with 'WanAnimateToVideo'."
        return {
            "pose_latents": Input("Latents of poses", ("batch", *poses), advice, optional=True),
            "face_pixel_values": Input("Videos of faces", faces, advice, optional=True),
        }

    def _of_passing_poses(self) -> dict[str, Input]:
        """What Wan Animate 2 looks at: a video of poses, with a caption and a picture."""
        channels = ("channels", (self.in_channels - 4) // 2)  # twice, and a mask
        poses = ("batch", channels, "pose frames", "height", "width")
        advice = "Set them with 'WanAnimate2ToVideo'."
        found = {
            "pose_latents": Input("Latents of poses", poses, advice, optional=True),
            "context_pose": replace(of.captions(self.context_dim), what="Captions of poses"),
        }
        if self.image_dim:
            features = ("batch", "pose patches", ("width", self.image_dim))
            found["clip_fea_pose"] = Input("CLIP vision features of poses", features)
        return {name: replace(one, optional=True) for name, one in found.items()}

    def prepared(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same. Raises InputError for CLIP features that have no position.

        ComfyUI's class leaves those out, and takes as many tokens of the caption for features.
        """
        for name in _FEATURES & inputs.keys():
            got, places = inputs[name].shape[1], self.image_positions
            if places is not None and got > places:
                raise InputError(
                    f"CLIP vision features of this {FAMILY.label} model (the model input {name}) "
                    f"have at most {places} patches, which have a position each; got {got}. Give "
                    "the node that makes its conditioning fewer pictures."
                )
        return inputs

    @cached_property
    def table(self) -> Table:
        dim, kernel, gathered = self.dim, PATCH, Column(gather=True)
        heads, units = Split(self.num_heads, self.head_dim), (self.head_dim, self.head_dim)
        column, row = Column((heads,)), Row((heads,))
        time, text = f"{_OUTSIDE}.time_embedder", f"{_OUTSIDE}.text_embedder"
        outside: tuple[TableRow, ...] = (
            Tensor("patch_embedding.weight", "", (dim, self.in_channels, *kernel), exact=True),
            Tensor("patch_embedding.bias", "", (dim,), exact=True),
            *mlp(f"{time}.linear_{{1,2}}", "time_embedding.{0,2}", (TIME_CHANNELS, dim, dim)),
            *mlp(f"{text}.linear_{{1,2}}", "text_embedding.{0,2}", (self.context_dim, dim, dim)),
            Linear(f"{_OUTSIDE}.time_proj", "time_projection.1", gathered, dim, 6 * dim),
            Linear("proj_out", "head.head", Replicated(), dim, 4 * self.out_channels),
            Tensor("scale_shift_table", "head.modulation", (1, 2, dim)),
        )
        block: tuple[TableRow, ...] = (
            *attention("attn1", heads, dim, ("self_attn.{q,k,v}", "self_attn.o"), IMAGE),
            Linear("attn2.to_q", "cross_attn.q", column, dim, dim, IMAGE),
            Linear(
                "attn2.{to_k,to_v}",
                "cross_attn.{k,v}",
                MergedColumn("to_kv", units),
                dim,
                2 * (dim,),
                PROMPT,
            ),
            Linear("attn2.to_out.0", "cross_attn.o", row, dim, dim, IMAGE),
            *mlp("ffn.net.{0.proj,2}", "ffn.{0,2}", (dim, self.mlp_dim, dim), IMAGE),
            Tensor("attn1.norm_{q,k}.weight", "self_attn.norm_{q,k}.weight", (dim,), heads),
            Tensor("attn2.norm_{q,k}.weight", "cross_attn.norm_{q,k}.weight", (dim,), heads),
            Tensor("norm2.{weight,bias}", "norm3.{weight,bias}", (dim,)),
            Tensor("scale_shift_table", "modulation", (1, 6, dim)),
        )
        attentions = Attention(heads, IMAGE, IMAGE), Attention(heads, IMAGE, TEXT)
        if self.image_dim:
            outside += self._of_pictures(self.image_dim)
            added = MergedColumn("to_added_kv", units)
            names = "attn2.{add_k_proj,add_v_proj}", "cross_attn.{k_img,v_img}"
            block += (
                Linear(*names, added, dim, 2 * (dim,), PROMPT),
                Tensor("attn2.norm_added_k.weight", "cross_attn.norm_k_img.weight", (dim,), heads),
            )
        if self.reference_channels:
            shape = dim, self.reference_channels, *kernel[1:]
            outside += Tensor("ref_conv.weight", "", shape), Tensor("ref_conv.bias", "", (dim,))
        for name, channels in ((_POSE, self.pose_channels), (_MASKS, self.mask_channels)):
            if channels:
                weight = Tensor(f"{name}.weight", "", (dim, channels, *kernel), exact=True)
                outside += weight, Tensor(f"{name}.bias", "", (dim,), exact=True)
        if self.camera_channels:
            outside += self._of_cameras(self.camera_channels * CAMERA_DOWNSCALE**2)
        stacks = [Stack("blocks", "blocks", self.num_blocks, block, attentions)]
        if self.vace_channels:
            outside += (
                Tensor(f"{_VACE}.weight", "", (dim, self.vace_channels, *kernel), exact=True),
                Tensor(f"{_VACE}.bias", "", (dim,), exact=True),
                Linear("vace_blocks.0.proj_in", "vace_blocks.0.before_proj", gathered, dim, dim),
            )
            block += (Linear("proj_out", "after_proj", gathered, dim, dim, IMAGE),)
            stacks.append(Stack("vace_blocks", "vace_blocks", self.vace_blocks, block, attentions))
        if not self.has_faces:
            return Table(outside, tuple(stacks))
        stacks.append(animate.faces(heads, self.head_dim, self.num_blocks))
        return Table((*outside, *animate.outside(dim)), tuple(stacks), animate.kernels())

    def _of_cameras(self, channels: int) -> tuple[TableRow, ...]:
        """The convolutions of a camera's path, which run once a generation, on every rank."""
        dim, blocks = self.dim, f"{_CAMERA}.residual_block"
        convolutions = [(f"{blocks}.conv{n}", f"{blocks}s.0.conv{n}") for n in (1, 2)]
        return (
            Tensor(f"{_CAMERA}.conv.weight", "", (dim, channels, *PATCH[1:])),
            Tensor(f"{_CAMERA}.conv.bias", "", (dim,)),
            *(
                Tensor(f"{ours}.weight", f"{file}.weight", (dim, dim, 3, 3))
                for ours, file in convolutions
            ),
            *(Tensor(f"{ours}.bias", f"{file}.bias", (dim,)) for ours, file in convolutions),
        )

    def _of_pictures(self, width: int) -> tuple[TableRow, ...]:
        """What prepares CLIP's features for the blocks."""
        ours, file, dim = f"{_OUTSIDE}.image_embedder", "img_emb.proj", self.dim
        rows: tuple[TableRow, ...] = (
            Tensor(f"{ours}.norm1.{{weight,bias}}", f"{file}.0.{{weight,bias}}", (width,)),
            *mlp(f"{ours}.ff.net.{{0.proj,2}}", f"{file}.{{1,3}}", (width, width, dim)),
            Tensor(f"{ours}.norm2.{{weight,bias}}", f"{file}.4.{{weight,bias}}", (dim,)),
        )
        if self.image_positions:
            shape = 1, self.image_positions, width
            rows += (Tensor(f"{ours}.pos_embed", "img_emb.emb_pos", shape),)
        return rows


_PLAIN = None, None, None, 0, None, None, None, None, False, False  # of text to video
FAMILY = Family(
    name="wan",
    label="Wan",
    models=(
        *("2.1", "2.2", "2.2 5B", "VACE", "Fun Control", "Fun Camera", "Bernini"),
        *("SCAIL", "SCAIL-2", "Animate", "Animate 2"),
    ),
    sizes=WanSizes,
    signature=("head.modulation", "blocks.0.cross_attn.norm_q.weight", "patch_embedding.weight"),
    diffusers_class="WanTransformer3DModel",
    published=WanSizes(40, 128, 13824, 40, 16, 16, 4096, *_PLAIN),
    small=WanSizes(20, 16, 640, 2, 16, 16, 64, *_PLAIN),
    variant=WanSizes(40, 128, 13824, 40, 36, 16, 4096, 1280, *_PLAIN[1:-2], True, False),  # Animate
    variants={
        "casual_audio_encoder.encoder.final_linear.weight": "Wan S2V",
        "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
        "patch_embedding_global.weight": "WanDancer",
        # Of the tensors of ordinary models.
        "model_type=flow_rvs": "FlowRVS",
        "causal_ar=True": "causal Wan (Causal Forcing, Self Forcing)",
    },
    newer={
        f"{_MASKS}.weight": ("SCAIL-2", "0.33"),
        f"{_POSE}.weight": ("SCAIL", "0.33"),
        "model_type=animate2": ("Wan Animate 2", "0.33"),
    },
    text_tokens=512,
    extents=((832, 480, 81), (1280, 720, 81)),
    shares_tokens=True,
    widens="patch_embedding.weight",
)
