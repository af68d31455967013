"""Videos over HTTP: stock nodes around our MODELs give what they give around the stock ones."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.compatibility import NEWER
from support.group_reports import group, rank_pids
from support.lora_files import factors
from support.tiny_models import tiny_shapes, write_tiny
from support.tiny_vae import WAN_VAE_NAME, write_tiny_wan_vae
from support.workflows import Prompt, node, tp_loader, with_report

pytestmark = pytest.mark.comfy

# File → what its model differs in from the one of text to video.
FILES: Mapping[str, Mapping[str, Any]] = {
    "t2v": {},
    "i2v": {"in_channels": 36, "image_dim": 1280},
    "flf2v": {"in_channels": 36, "image_dim": 1280, "image_positions": 514},
    "fun": {"in_channels": 48, "image_dim": 1280},
    "fun_2.2": {"in_channels": 52, "reference_channels": 16},
    "vace": {"num_blocks": 2, "vace_blocks": 2, "vace_channels": 96},
    "camera": {"in_channels": 32, "image_dim": 1280, "camera_channels": 24},
    "scail": {"in_channels": 20, "image_dim": 1280, "pose_channels": 20, "mask_channels": 28},
    "animate": {"num_blocks": 5, "in_channels": 36, "image_dim": 1280, "has_faces": True},
    "animate_2": {"in_channels": 36, "image_dim": 1280, "poses_pass": True},
    "5b": {"in_channels": 48, "out_channels": 48},
    "high": {"in_channels": 36},
    "low": {"in_channels": 36, "seed": 1},
}
PICTURES = ("first.png", "last.png")
SIZE = {"width": 64, "height": 48, "length": 9}
SAMPLER = {
    "steps": 3,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "denoise": 1.0,
}
# Where cond and uncond are a batch: in another process the CPU adds up in another order.
BATCH_TOLERANCE = 1e-4

Compare = Callable[..., History]


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server: ComfyServer) -> None:
    """The models, a VAE, two pictures, and a LoRA for each of the two models of a pair."""
    for name, changes in FILES.items():
        write_tiny("wan", comfy_server.models / "diffusion_models" / file(name), **changes)
    write_tiny_wan_vae(comfy_server.models)
    generator = torch.Generator().manual_seed(0)
    for name in PICTURES:
        pixels = torch.randint(0, 256, (48, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(comfy_server.base / "input" / name)
    (comfy_server.models / "loras").mkdir(exist_ok=True)
    for seed, name in enumerate(("high", "low")):
        save_file(lightx2v_lora(seed), comfy_server.models / "loras" / file(name))


def file(name: str) -> str:
    return f"wan_{name}.safetensors"


def lightx2v_lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA that also changes norms (``.diff``) and biases (``.diff_b``), as lightx2v's do."""
    shapes = tiny_shapes("wan", in_channels=36)
    layers = ("self_attn.q", "self_attn.o", "cross_attn.k", "cross_attn.o", "ffn.0", "ffn.2")
    paths = [f"blocks.{index}.{layer}" for index in (0, 1) for layer in layers]
    paths += ["time_projection.1", "text_embedding.2", "head.head"]
    tensors = factors([(path, shapes[f"{path}.weight"]) for path in paths], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        change = 0.2 * torch.randn(shapes[f"{path}.bias"], generator=generator)
        tensors[f"diffusion_model.{path}.diff_b"] = change
    for index in (0, 1):
        for path in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "norm3"):
            name = f"blocks.{index}.{path}"
            change = 0.2 * torch.randn(shapes[f"{name}.weight"], generator=generator)
            tensors[f"diffusion_model.{name}.diff"] = change
        change = 0.2 * torch.randn(shapes[f"blocks.{index}.norm3.bias"], generator=generator)
        tensors[f"diffusion_model.blocks.{index}.norm3.diff_b"] = change
    return tensors


def video(name: str, maker: dict[str, Any], *, seed: int = 7, **sampler: Any) -> Prompt:
    """Captions, pictures → the node ``maker`` → KSampler → SaveLatent, on a model of ``FILES``."""
    prompt = {
        "model": tp_loader(file(name), 2),
        "positive": node("TPTestConditioning", seed=1, length=12, width=64, batch=1),
        "negative": node("TPTestConditioning", seed=2, length=20, width=64, batch=1),
        "vae": node("VAELoader", vae_name=WAN_VAE_NAME),
        "first": node("LoadImage", image=PICTURES[0]),
        "last": node("LoadImage", image=PICTURES[1]),
        "seen": node("TPTestSeen", seed=3, patches=257, width=1280),
        "moving": node("RepeatImageBatch", image=["last", 0], amount=SIZE["length"]),
        "path": node("WanCameraEmbedding", camera_pose="Zoom In", **SIZE),
        "maker": maker,
        "sampler": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["maker", 0],
            seed=seed,
            **SAMPLER | sampler,
        ),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/video"),
    }
    if "positive" in maker["inputs"]:
        outputs = {"positive": ["maker", 0], "negative": ["maker", 1], "latent_image": ["maker", 2]}
        prompt["sampler"]["inputs"] |= outputs
    return prompt


def conditioned(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node that puts pictures into both conditionings, and makes the latent."""
    links = {"positive": ["positive", 0], "negative": ["negative", 0], "vae": ["vae", 0]}
    return node(class_type, batch_size=1, **SIZE, **links, **inputs)


EMPTY = node("EmptyHunyuanLatentVideo", batch_size=1, **SIZE)
FIRST, LAST, SEEN, MOVING = ["first", 0], ["last", 0], ["seen", 0], ["moving", 0]
RANGE: dict[str, Any] = {"pose_strength": 1.0, "pose_start": 0.0, "pose_end": 1.0}
RANGE |= {"previous_frame_count": 5, "video_frame_offset": 0}
CHUNK: dict[str, Any] = {"continue_motion_max_frames": 5, "video_frame_offset": 0}
MAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("t2v", EMPTY),
    "33 frames of odd sizes": (
        "t2v",
        node("EmptyHunyuanLatentVideo", batch_size=1, width=56, height=40, length=33),
    ),
    "first frame": (
        "i2v",
        conditioned("WanImageToVideo", start_image=FIRST, clip_vision_output=SEEN),
    ),
    "first frame, CLIP alone": ("i2v", conditioned("WanImageToVideo", clip_vision_output=SEEN)),
    "first frame, 2.2": ("high", conditioned("WanImageToVideo", start_image=FIRST)),
    "first and last frame": (
        "flf2v",
        conditioned(
            "WanFirstLastFrameToVideo",
            start_image=FIRST,
            end_image=LAST,
            clip_vision_start_image=SEEN,
            clip_vision_end_image=SEEN,
        ),
    ),
    "control video": (
        "fun",
        conditioned(
            "WanFunControlToVideo",
            start_image=FIRST,
            control_video=LAST,
            clip_vision_output=SEEN,
        ),
    ),
    "control video, 2.2": (
        "fun_2.2",
        conditioned("Wan22FunControlToVideo", ref_image=FIRST, control_video=LAST),
    ),
    "VACE": (
        "vace",
        conditioned("WanVaceToVideo", strength=0.8, control_video=LAST, reference_image=FIRST),
    ),
    "camera": (
        "camera",
        conditioned(
            "WanCameraImageToVideo",
            start_image=FIRST,
            clip_vision_output=SEEN,
            camera_conditions=["path", 0],
        ),
    ),
}

MAKERS |= {
    "poses and a face": (
        "animate",
        conditioned(
            "WanAnimateToVideo",
            **CHUNK,
            reference_image=FIRST,
            clip_vision_output=SEEN,
            face_video=LAST,
            pose_video=MOVING,
        ),
    ),
    "poses after a video, before a background": (
        "animate",
        conditioned(
            "WanAnimateToVideo",
            **CHUNK,
            reference_image=FIRST,
            pose_video=MOVING,
            background_video=MOVING,
            continue_motion=MOVING,
        ),
    ),
}

POSES = {"pose_video": MOVING, "pose_video_mask": MOVING, "clip_vision_output": SEEN}
# Of newer releases.
NEWER_MAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "poses": ("scail", conditioned("WanSCAILToVideo", **POSES, **RANGE)),
    "people and poses": (
        "scail",
        conditioned(
            "WanSCAILToVideo", reference_image=FIRST, reference_image_mask=LAST, **POSES, **RANGE
        ),
    ),
    "people in the place of others, and a part of the steps": (
        "scail",
        conditioned(
            "WanSCAILToVideo",
            reference_image=["people", 0],
            reference_image_mask=["people", 0],
            previous_frames=MOVING,
            replacement_mode=True,
            **POSES,
            **RANGE | {"pose_end": 0.6, "pose_strength": 0.8},
        ),
    ),
}


ALL_POSES = {"pose_strength": 1.0, "pose_start_percent": 0.0, "pose_end_percent": 1.0}
ALL_POSES |= {"reference_image_strength": 1.0, "video_frame_offset": 0, "pose_video": MOVING}
NEWER_MAKERS |= {
    "poses that pass": (
        "animate_2",
        conditioned(
            "WanAnimate2ToVideo", reference_image=FIRST, clip_vision_output=SEEN, **ALL_POSES
        ),
    ),
    "poses that pass, in a part of the steps": (
        "animate_2",
        conditioned(
            "WanAnimate2ToVideo",
            reference_image=FIRST,
            clip_vision_output=SEEN,
            positive_pose=["negative", 0],
            clip_vision_output_pose=SEEN,
            continue_motion=MOVING,
            **ALL_POSES
            | {"pose_end_percent": 0.6, "pose_strength": 0.8, "reference_image_strength": 1.2},
        ),
    ),
}


@pytest.mark.skipif(not NEWER, reason="ComfyUI has SCAIL and Wan Animate 2 since 0.33")
@pytest.mark.parametrize("case", NEWER_MAKERS)
def test_a_video_by_nodes_of_newer_releases(same_as_stock: Compare, case: str) -> None:
    prompt = video(*NEWER_MAKERS[case])
    prompt["people"] = node("ImageBatch", image1=["first", 0], image2=["last", 0])
    same_as_stock(prompt)


@pytest.mark.skipif(not NEWER, reason="ComfyUI has Wan Animate 2 since 0.33")
def test_what_keeps_poses_in_comfyui_has_no_effect(same_as_stock: Compare) -> None:
    """The ranks keep keys and values of a video of poses over a generation, asked for or not."""
    prompt = video(*NEWER_MAKERS["poses that pass"], cfg=2.5)
    prompt["kept"] = node("WanAnimate2Cache", model=["model", 0], device="cpu", dtype="default")
    prompt["sampler"]["inputs"]["model"] = ["kept", 0]
    same_as_stock(prompt, BATCH_TOLERANCE)


@pytest.mark.skipif(NEWER, reason="this ComfyUI knows it")
def test_an_older_comfyui_is_told_what_it_does_not_know(comfy_server: ComfyServer) -> None:
    with pytest.raises(PromptError, match=r"Wan Animate 2 file \(its metadata .*0.33 knows it"):
        comfy_server.run(video("animate_2", EMPTY))


@pytest.mark.rotates(5)
@pytest.mark.parametrize("case", MAKERS)
def test_a_video_is_the_stock_one(same_as_stock: Compare, case: str) -> None:
    same_as_stock(video(*MAKERS[case]))


def test_guidance_in_one_batch(same_as_stock: Compare) -> None:
    prompt = video(*MAKERS["first frame"], cfg=2.5)
    prompt["negative"]["inputs"]["length"] = 12
    same_as_stock(prompt, BATCH_TOLERANCE)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("start_image", [{}, {"start_image": FIRST}], ids=["text", "first frame"])
def test_five_billion(same_as_stock: Compare, start_image: dict[str, Any]) -> None:
    """Its first frame is kept by a mask, which is made timesteps of frames."""
    size = {"width": 128, "height": 96, "length": 9, "batch_size": 1}
    maker = node("Wan22ImageToVideoLatent", vae=["vae", 0], **size, **start_image)
    prompt = video("5b", maker) | {"vae": node("TPTestVideoVAE")}
    same_as_stock(prompt)


def pair(*, seed: int = 7, steps: int = 4) -> Prompt:
    """Wan 2.2's way: one model for the noisy half of the steps, one for the rest.

    Each with its 4-step LoRA and a shift, as ComfyUI's template has it; both on one group.
    """
    prompt = video("high", MAKERS["first frame, 2.2"][1])
    del prompt["model"], prompt["sampler"]
    for name in ("high", "low"):
        prompt[name] = tp_loader(file(name), 2)
        prompt[f"{name} lora"] = node(
            "LoraLoaderModelOnly", model=[name, 0], lora_name=file(name), strength_model=0.8
        )
        prompt[f"{name} shifted"] = node("ModelSamplingSD3", model=[f"{name} lora", 0], shift=5.0)
    shared = {"positive": ["maker", 0], "negative": ["maker", 1], "noise_seed": seed, "cfg": 1.0}
    shared |= {"steps": steps, "sampler_name": "euler", "scheduler": "simple"}
    prompt["first half"] = node(
        "KSamplerAdvanced",
        model=["high shifted", 0],
        latent_image=["maker", 2],
        add_noise="enable",
        start_at_step=0,
        end_at_step=steps // 2,
        return_with_leftover_noise="enable",
        **shared,
    )
    prompt["sampler"] = node(
        "KSamplerAdvanced",
        model=["low shifted", 0],
        latent_image=["first half", 0],
        add_noise="disable",
        start_at_step=steps // 2,
        end_at_step=10_000,
        return_with_leftover_noise="disable",
        **shared,
    )
    return prompt


def test_a_pair_of_models_on_one_group(comfy_server: ComfyServer, same_as_stock: Compare) -> None:
    history = same_as_stock(with_report(pair()))
    for rank in group(history)["ranks"]:
        assert {name.partition("@")[0] for name in rank["models"]} >= {file("high"), file("low")}
    # Unloaded, both sleep; the next prompt wakes them in the ranks that there are.
    pids = rank_pids(history)
    comfy_server.free_until(lambda: not awake(comfy_server))
    history = same_as_stock(with_report(pair(seed=8)))
    assert rank_pids(history) == pids


def awake(server: ComfyServer) -> list[str]:
    """The names of the pair's models that have weights on the devices now."""
    report = server.run({"report": node("TPRuntimeInfo")})
    return [
        name
        for rank in group(report)["ranks"]
        for name, model in rank["models"].items()
        if name.startswith((file("high"), file("low"))) and model["resident_bytes"]
    ]


def test_cancel_in_mid_video(comfy_server: ComfyServer, same_as_stock: Compare) -> None:
    comfy_server.events.clear()
    prompt_id = comfy_server.queue(pair(steps=5000))
    comfy_server.events.wait_for("progress", lambda event: event.data["max"] == 2500)
    comfy_server.interrupt()
    with pytest.raises(PromptError) as error:
        comfy_server.wait(prompt_id, timeout_s=30)
    assert error.value.type == "interrupted"
    same_as_stock(pair(seed=9))


def test_a_rank_that_is_killed_in_mid_video(
    comfy_server: ComfyServer, same_as_stock: Compare
) -> None:
    """The second model's step fails; then both models are loaded by another group."""
    pids = rank_pids(comfy_server.run(with_report(pair(seed=10))))
    comfy_server.events.clear()
    prompt_id = comfy_server.queue(pair(seed=11, steps=1000))
    comfy_server.events.wait_for(
        "progress", lambda event: event.data["max"] == 500 and event.data["node"] == "sampler"
    )
    comfy_server.kill_in_mid_evaluation(pids[1])
    with pytest.raises(PromptError) as error:
        comfy_server.wait(prompt_id, timeout_s=60)
    assert error.value.node_id == "sampler"
    assert error.value.type.endswith("GroupDiedError")
    history = same_as_stock(with_report(pair(seed=12)))
    assert not set(rank_pids(history)) & set(pids)
