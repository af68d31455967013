"""Image and video models that ComfyUI knows and that cannot be split: to be refused by their names.

Facts: ``detect_unet_config`` of ComfyUI 0.33 (comfy/model_detection.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Lengths = tuple[int | None, ...]  # of a tensor's axes; None: any


@dataclass(frozen=True)
class Other:
    """A model whose files have all of these ``tensors``: the first is what a message names.

    ``shapes``: of those that tell by more than their name. ``like``: the family whose signature its
    files have as well; None: they have no family's.
    """

    label: str
    tensors: tuple[str, ...]
    shapes: Mapping[str, Lengths] = field(default_factory=dict)
    like: str | None = None

    def matches(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file of these tensors is one of it."""
        return all(name in shapes for name in self.tensors) and all(
            _fits(shapes.get(name, ()), lengths) for name, lengths in self.shapes.items()
        )

    def sign(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """What tells that a file with these tensors is one of it."""
        name = self.tensors[0]
        if name in self.shapes:
            return f"its tensor {name} has the shape {list(shapes[name])}"
        return f"it has the tensor {name}"


def _fits(shape: tuple[int, ...], lengths: Lengths) -> bool:
    return len(shape) == len(lengths) and all(
        wanted in (None, length) for length, wanted in zip(shape, lengths, strict=True)
    )


_REFINER = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
_LUMINA = "cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"
_FLUX = "double_blocks.0.img_mod.lin.weight"
# The first that matches is named.
OTHERS = (
    # Blocks of Qwen-Image, latents that are not packed into patches, a smaller text encoder.
    Other(
        "Mage-Flow",
        ("txt_norm.weight", "proj_out.weight"),
        {"txt_norm.weight": (2560,), "proj_out.weight": (128, None)},
        like="qwen_image",
    ),
    Other("Z-Image in pixel space", ("dec_net.cond_embed.weight",), like="z_image"),
    Other("Chroma Radiance", ("nerf_image_embedder.embedder.0.weight", "txt_in.weight")),
    Other("Chroma", ("distilled_guidance_layer.in_proj.weight",)),
    Other("Ovis-Image", ("double_blocks.0.img_mlp.gate_proj.weight",)),
    Other("LongCat-Image", ("txt_in.weight", _FLUX), {"txt_in.weight": (None, 3584)}),
    Other("HunyuanVideo 1.5", ("vision_in.proj.0.weight", _REFINER)),
    Other("HunyuanImage", (_REFINER,), {"img_in.proj.weight": (None, None, None, None)}),
    Other("HunyuanVideo", (_REFINER,)),
    Other("JoyImage", ("double_blocks.0.attn.img_attn_qkv.weight",)),
    Other("NewBie", ("clip_text_pooled_proj.0.weight", *_LUMINA)),
    Other("Lumina 2", ("layers.0.adaLN_modulation.1.weight", *_LUMINA)),
    Other("Lens", ("transformer_blocks.0.img_mlp.w1.weight",)),
    Other(
        "LTX-Video", ("patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.bias")
    ),
    Other("Stable Diffusion 3", ("joint_blocks.0.context_block.attn.qkv.weight",)),
    Other("Stable Cascade", ("clf.1.weight",)),
    Other("AuraFlow", ("double_layers.0.attn.w1q.weight",)),
    Other("Hunyuan-DiT", ("mlp_t5.0.weight",)),
    Other("Mochi", ("t5_yproj.weight",)),
    Other("PixArt", ("t_block.1.weight",)),
    Other("PixArt", ("pos_embed.proj.bias", "adaln_single.emb.timestep_embedder.linear_1.bias")),
    Other("Cosmos", ("blocks.block0.blocks.0.block.attn.to_q.0.weight",)),
    Other("PiD", ("lq_proj.latent_proj.0.weight",)),
    Other("PixelDiT", ("core.pixel_embedder.proj.weight",)),
    Other("CogVideoX", ("blocks.0.norm1.linear.weight",)),
    Other("SeedVR2", ("vid_in.proj.weight", "emb_in.proj_in.weight")),
    Other("HiDream-O1", ("x_embedder.proj1.weight", "t_embedder1.mlp.0.weight")),
    Other("HiDream", ("caption_projection.0.linear.weight",)),
    Other("Anima", ("llm_adapter.blocks.0.cross_attn.q_proj.weight",)),
    Other("Cosmos Predict2", ("blocks.0.mlp.layer1.weight",)),
    Other("Boogu-Image", ("double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight",)),
    Other("OmniGen2", ("time_caption_embed.timestep_embedder.linear_1.bias",)),
    Other("Ideogram 4", ("embed_image_indicator.weight",)),
    Other("Kandinsky 5", ("visual_transformer_blocks.0.cross_attention.key_norm.weight",)),
    Other("ERNIE-Image", ("layers.0.mlp.linear_fc2.weight",)),
    Other("Stable Diffusion (UNet)", ("input_blocks.0.0.weight",)),
)
