"""From what ComfyUI's MiniMax H3 is given to tables for the ranks; run by the process that asks.

Follows ``MiniMaxH3Model._forward`` (0.33, comfy/ldm/minimax/model.py), which decides by the values
of timesteps and masks. Here every token gets a number, that of its time; the numbers stay the same
over a generation, and each evaluation has the times.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InputError

PATCH = (1, 2, 2)
SIDES = 2  # of sound: left and right
FRAMES_OF_LATENTS = (1, 4, 4, 4, 4)  # and again
VIDEO_SHIFT, AUDIO_SHIFT = "minimax_h3_sigma_shift_video", "minimax_h3_sigma_shift_audio"
SHIFTS = {VIDEO_SHIFT: 12.0, AUDIO_SHIFT: 3.0}
# Times from noise at 0 to 1; conditions have at least these, unless a node says otherwise.
CONDITION_TIME, AUDIO_CONDITION_TIME = 0.999, 1.0
LEAST_SIGMA = 1e-6
FULLY = 1 - 1e-3  # from here on, a mask's value means that all is made anew
# The first times of an evaluation, by what they are of; those of masked tokens follow.
VIDEO_TIME, AUDIO_TIME, CONDITION, AUDIO_CONDITION, NUM_TIMES = range(5)
_KINDS = ("image", "audio", "video", "video_audio")

Payload = dict[str, Any]


def frames_of(num_latents: int) -> int:
    """Frames of a video that so many latents stand for."""
    return sum(islice(cycle(FRAMES_OF_LATENTS), num_latents))


def prepared(inputs: Mapping[str, Any], video_channels: int, audio_channels: int) -> dict[str, Any]:
    """Instead of ``timesteps`` (1,) the times (n,) fp32 of ``NUM_TIMES`` kinds of tokens and of
    masked ones; instead of masks, the number of each target token's time, video (L,) and audio (L,)
    int64; instead of the payload, plain data of lists (``_payload``).

    Raises:
        InputError: a batch, or a payload that does not fit the latents.
    """
    video: torch.Tensor = inputs["x"][0]
    if len(video) != 1:
        raise InputError(
            f"MiniMax H3 makes one video at a time; got a batch of {len(video)}. Set the batch "
            "size of the latent to 1."
        )
    payload = _payload(inputs.get("minimax_payload") or {}, inputs["context"].shape[1])
    _check_latents(payload, video, video_channels, audio_channels)
    options = inputs.get("transformer_options") or {}
    sigma = (inputs["timesteps"].detach().flatten()[0].cpu() / 1000.0).float().clamp(LEAST_SIGMA)
    shifts = [float(options.get(name, usual)) for name, usual in SHIFTS.items()]
    video_time = float(1.0 - sigma)
    audio_time = float(1.0 - _shifted(sigma, *shifts))
    times = [
        video_time,
        audio_time,
        max(video_time, payload["visual_cond_noise_aug"]),
        max(audio_time, payload["audio_cond_noise_aug"]),
    ]
    found = {**inputs, "minimax_payload": payload}
    masks = (
        ("denoise_mask", _of_patches, sigma, max(video_time, CONDITION_TIME)),
        (
            "audio_denoise_mask",
            torch.flatten,
            1.0 - audio_time,
            max(audio_time, AUDIO_CONDITION_TIME),
        ),
    )
    table = [torch.tensor(times, dtype=torch.float32)]
    for name, of_tokens, strength, at_most in masks:
        mask = found.pop(name, None)
        values = None if mask is None else of_tokens(mask[0, 0].detach().float().cpu())
        if values is not None and not bool((values >= FULLY).all()):
            levels, places = values.unique(return_inverse=True)
            found[name] = places + sum(map(len, table))
            table.append((1.0 - levels * strength).clamp(max=at_most))
    found["timesteps"] = torch.cat(table)
    found["transformer_options"] = {k: v for k, v in options.items() if k not in SHIFTS}
    return found


def _shifted(sigma: torch.Tensor, from_shift: float, to_shift: float) -> torch.Tensor:
    """The sigma that another shift has at the same place of the schedule."""
    base = sigma / (from_shift + sigma * (1.0 - from_shift))
    return to_shift * base / (1.0 + (to_shift - 1.0) * base)


def _of_patches(mask: torch.Tensor) -> torch.Tensor:
    """(T, H, W) → (L,): of each patch the most."""
    rows, columns = mask.shape[1:]
    mask = F.pad(mask, (0, -columns % PATCH[2], 0, -rows % PATCH[1]), mode="replicate")
    return mask.unflatten(2, (-1, PATCH[2])).unflatten(1, (-1, PATCH[1])).amax((2, 4)).flatten()


def _payload(given: Mapping[str, Any], num_text: int) -> Payload:
    """``keyframes``: [frame, latents, audio latents] each; ``refs``: [kind, rows, columns, latents,
    audio latents] each, rows and columns of latents; ``cond_video_latents``, ``cond_audio_latents``
    of both, in that order; ``text_token_tags`` (L,) int64, if there are some; ``seed`` of the noise
    and how much of the latents is none of it.
    """
    tags = given.get("text_token_tags")
    found: Payload = {
        "keyframes": [_keyframe(one) for one in _listed(given, "keyframes", Mapping)],
        "refs": [_reference(one) for one in _listed(given, "refs", Mapping)],
        "cond_video_latents": _listed(given, "cond_video_latents", torch.Tensor),
        "cond_audio_latents": _listed(given, "cond_audio_latents", torch.Tensor),
        "seed": _number(given, "seed", 0, int),
        "visual_cond_noise_aug": float(_number(given, "visual_cond_noise_aug", CONDITION_TIME)),
        "audio_cond_noise_aug": float(_number(given, "audio_cond_noise_aug", AUDIO_CONDITION_TIME)),
    }
    if not -(2**63) <= found["seed"] < 2**64 - 1:
        raise _wrong("seed", "a number below 2**64 - 1", found["seed"])
    if tags is not None:
        if not isinstance(tags, torch.Tensor) or tags.is_floating_point():
            raise _wrong("text_token_tags", "a tensor of integers", tags)
        tags = tags.detach().flatten()[:num_text].long().cpu()
        if len(tags) < num_text or not bool(((tags >= 0) & (tags <= 2)).all()):
            raise InputError(
                f"MiniMax H3's payload has text_token_tags {tuple(tags.shape)} for {num_text} "
                "tokens of text; each must have one of 0, 1 and 2. Encode the prompt again."
            )
        found["text_token_tags"] = tags
    return found


def _listed(given: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    found = given.get(name) or []
    if not isinstance(found, list | tuple) or not all(isinstance(one, kind) for one in found):
        raise _wrong(name, f"a list ({kind.__name__})", found)
    return list(found)


def _number(given: Mapping[str, Any], name: str, usual: float, *kinds: type) -> Any:
    found = given.get(name, usual)
    if isinstance(found, bool) or not isinstance(found, kinds or (int, float)):
        raise _wrong(name, "a number", found)
    return found


def _wrong(name: str, allowed: str, got: object) -> InputError:
    shown = got if isinstance(got, int | str) else f"a {type(got).__name__}"
    return InputError(
        f"MiniMax H3's payload has '{name}', which must be {allowed}; got {shown}. It comes from a "
        "node between the text encoder and the sampler: use ComfyUI's own 'MiniMax H3' nodes."
    )


def _keyframe(given: Mapping[str, Any]) -> list[int]:
    video, audio = given.get("latent"), given.get("audio_latent")
    frame = _length(given, "keyframes", "resolved_frame_index", 0)
    num_latents, num_samples = (
        one.shape[axis] if isinstance(one, torch.Tensor) else 0
        for one, axis in ((video, 2), (audio, -1))
    )
    return [frame, num_latents, num_samples]


def _reference(given: Mapping[str, Any]) -> list[Any]:
    kind = given.get("kind")
    if kind not in _KINDS:
        raise _wrong("refs.kind", f"one of {', '.join(_KINDS)}", kind)
    rows = columns = num_latents = num_samples = 0
    if kind != "audio":
        rows, columns = (_length(given, "refs", name, 1) for name in ("latent_h", "latent_w"))
        num_latents = 1 if kind == "image" else _length(given, "refs", "latent_t", 1)
    if kind != "image":
        num_samples = _length(given, "refs", "ref_audio_t", 0)
    return [kind, rows, columns, num_latents, num_samples]


def _length(given: Mapping[str, Any], of: str, name: str, least: int) -> int:
    found: int = _number(given, name, least - 1, int)
    if found < least:
        raise _wrong(f"{of}.{name}", f"a number from {least}", found)
    return found


def _check_latents(
    payload: Payload, video: torch.Tensor, video_channels: int, audio_channels: int
) -> None:
    """Raises InputError unless conditions are as large as the payload says, in its order."""
    size = tuple(length + length % 2 for length in video.shape[3:])
    pictures = [(num, *size) for _, num, _ in payload["keyframes"]]
    pictures += [(num, rows, columns) for _, rows, columns, num, _ in payload["refs"]]
    sounds = [num for *_, num in (*payload["keyframes"], *payload["refs"])]
    expected = [(1, video_channels, *one) for one in pictures if one[0]]
    _compare("cond_video_latents", payload, expected)
    _compare("cond_audio_latents", payload, [(1, audio_channels, SIDES, n) for n in sounds if n])


def _compare(name: str, payload: Payload, expected: Sequence[tuple[int, ...]]) -> None:
    found = [tuple(one.shape) for one in payload[name]]
    odd = any(rows % 2 or columns % 2 for *_, rows, columns in expected if len(_) == 3)
    if found != expected or odd or not all(one.is_floating_point() for one in payload[name]):
        raise InputError(
            f"MiniMax H3's payload has {name} of the shapes {found}; its keyframes and references "
            f"say {expected}, and rows and columns must be even. Make the latent and its "
            "conditions anew with ComfyUI's own 'MiniMax H3' nodes, of one size."
        )
