"""What classes of newer releases of ComfyUI compute, stored for tests on a release without them.

    COMFYUI_PATH=CHECKOUT PYTHON tests/support/newer_references.py [FAMILY ...]

computes every case, or those of some families, on tiny files with the classes of that checkout, and
writes the results below `tests/data`. PYTHON has the packages of that ComfyUI. Weights and inputs
are made again from their seeds wherever they are needed (`support.tiny_models`, `support.inputs`).
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its own folder is on the path then, which is no place to import from
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(TESTS), str(TESTS.parent)]

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support import minimax_payloads
from support.inputs import make_inputs
from support.ltx2_inputs import OF_2_0, OF_2_3, make_ltx2_inputs
from support.native import import_comfy, native_model, native_patcher
from support.paths import REPOSITORY
from support.random_numbers import normal, on_every_cpu
from support.tiny_models import tiny, write_tiny

DATA = REPOSITORY / "tests" / "data"
DTYPES = (torch.float32, torch.bfloat16)
STORED_AS = "stored_as"

_REFERENCES = {"references": ((9, 8), (16, 12), (6, 30)), "height": 12, "width": 15}
_SMALL_REFERENCES = {"references": ((5, 4), (8, 6), (3, 15)), "height": 6, "width": 7}
_BY_INDEX = {"ref_latents_method": "index"}
_EDIT_2511, _LAYERED = {"zero_time": True}, {"added_time": True}
_MASK = torch.tensor([[1] * 20, [1] * 13 + [0] * 7])
_AT_ZERO = {"ref_latents_method": "index_timestep_zero"}

_OTHER_ROPE = {
    "rope_type": "interleaved",
    "precision": "float32",
    "middle": False,
    "causal": False,
    "cross_time_scale": 1.0,
}
_GUIDES = {"frames": 5, "guides": 2}

# Such that bf16, to which the model rounds 1000 t and t, does not change: then it is the arithmetic
# that differs from fp32's.
_OTHERS = {  # videos and pictures that a video is made after (Bernini)
    "frames": 3,
    "height": 6,
    "width": 8,
    "time_scale": 1000.0,
    "references": ((6, 8), (5, 3), (2, 9)),
    "lengths": {"other frames": 2},
}
_SCAIL = {"in_channels": 20, "image_dim": 1280, "pose_channels": 20}
_SCAIL_2 = _SCAIL | {"mask_channels": 28}
_PEOPLE = {"pictures": 2, "pose frames": 3, "pose rows": 3, "pose columns": 4}
_MASKED = _PEOPLE | {"masked frames": 5}
_ANIMATE_2 = {"in_channels": 36, "image_dim": 1280, "poses_pass": True}
_POSED = {"pose frames": 2, "pose patches": 9}
_MOVING = {"frames": 3, "height": 6, "width": 8, "time_scale": 1000.0}
_ROPE = {"scale_x": 1.5, "scale_y": 0.75, "shift_x": 2.0, "shift_t": 3.0}
_MOVED = {"transformer_options": {"rope_options": _ROPE, "references_move": True}}
_EXACT_TIMES = {"timesteps": torch.tensor([0.5])}
_SMALL = {"height": 6, "width": 7}
_SLOTS = _SMALL | {"references": ((5, 4), (8, 6), (3, 9)), "image_slots": [3, 3, 11]}

# Family → case → changes of the tiny model's sizes, and arguments of `make_inputs`. Among the first
# may be a quantised format that the file is `stored_as`; it computes in fp32 only.
Case = tuple[Mapping[str, Any], Mapping[str, Any]]
CASES: dict[str, dict[str, Case]] = {
    "flux": {
        f"rope options, references: {method}": (
            {},
            _SMALL_REFERENCES | _MOVED | {"ref_latents_method": method},
        )
        for method in ("offset", "index", "uxo")
    },
    "flux2": {
        "rope options, references": ({}, _SMALL_REFERENCES | _MOVED | {"batch": 2}),
        "rope options, references at time 0": ({}, _SMALL_REFERENCES | _MOVED | _AT_ZERO),
        "references at time 0": ({}, _REFERENCES | _AT_ZERO),
        "references at time 0, without guidance": (
            {"guidance": False},
            _REFERENCES | _AT_ZERO | {"batch": 2, "without": ("guidance",)},
        ),
        "references at time 0 with a ControlNet": (
            {},
            _REFERENCES | _AT_ZERO | {"residuals": {"input": (90, None), "output": (None, 200)}},
        ),
    },
    "minimax_h3": dict(minimax_payloads.CASES),
    "wan": {
        "other videos": ({}, _OTHERS),
        "other videos, odd sizes, batch": ({}, _OTHERS | {"batch": 2, "height": 5, "width": 7}),
        "other videos, timesteps of frames": ({}, _OTHERS | {"times_per_item": 3}),
        "other videos, rope options": (
            {},
            _OTHERS | {"transformer_options": {"rope_options": _ROPE}},
        ),
        "SCAIL": (_SCAIL, _MOVING | {"lengths": _PEOPLE}),
        "SCAIL, odd sizes, batch": (
            _SCAIL,
            _MOVING | {"height": 5, "width": 7, "batch": 2, "lengths": _PEOPLE | {"pictures": 1}},
        ),
        "SCAIL without anything": (_SCAIL, _MOVING | {"without": ("clip_fea",)}),
        "SCAIL-2": (_SCAIL_2, _MOVING | {"lengths": _MASKED}),
        "SCAIL-2, replacing people": (
            _SCAIL_2,
            _MOVING | {"lengths": _MASKED, "ref_mask_flag": False},
        ),
        "SCAIL-2, replacing people, rope options": (
            _SCAIL_2,
            _MOVING
            | {"lengths": _MASKED, "ref_mask_flag": False, "batch": 2}
            | {"transformer_options": {"rope_options": _ROPE}},
        ),
        "SCAIL-2, animating people, more frames": (
            _SCAIL_2,
            _MOVING
            | {"lengths": _MASKED | {"more frames": 2, "masked frames": 7}, "ref_mask_flag": True},
        ),
        "SCAIL-2, replacing without a picture": (
            _SCAIL_2,
            _MOVING
            | {"without": ("reference_latent", "ref_mask_latents"), "ref_mask_flag": False}
            | {"lengths": _MASKED},
        ),
        "Animate 2": (_ANIMATE_2, _MOVING | {"lengths": _POSED}),
        "Animate 2, odd sizes, batch": (
            _ANIMATE_2,
            _MOVING | {"height": 5, "width": 7, "batch": 2, "lengths": _POSED},
        ),
        "Animate 2, strengths, timesteps of frames": (
            _ANIMATE_2,
            _MOVING
            | {"lengths": _POSED, "times_per_item": 3}
            | {"pose_strength": 0.6, "reference_strength": 1.5},
        ),
        "Animate 2, poses with the video's caption": (
            _ANIMATE_2,
            _MOVING
            | {"lengths": {"pose frames": 2}, "without": ("context_pose",), "batch": 2}
            | {"transformer_options": {"rope_options": _ROPE}},
        ),
        "Animate 2 without poses": (
            _ANIMATE_2,
            _MOVING | {"without": ("clip_fea",), "reference_strength": 0.5},
        ),
        "a picture before, and other pictures": (
            {"in_channels": 52, "reference_channels": 16},
            _OTHERS | {"lengths": {"other frames": 1, "rows": 6, "columns": 8}},
        ),
    },
    "krea2": {
        "text to image": ({}, {}),
        "odd sizes": ({}, {"height": 17, "width": 15, "length": 33}),
        "batch of 3": ({}, {"batch": 3, "height": 4, "width": 6, "length": 1}),
        "wide": ({}, {"height": 2, "width": 320}),  # positions that bf16 rounds
        "references without a method": ({}, _SMALL_REFERENCES),
        "references by index": ({}, _SMALL_REFERENCES | _BY_INDEX),
        "references by index, batch": ({}, _SMALL_REFERENCES | _BY_INDEX | {"batch": 2}),
        "references at time 0": ({}, _SMALL_REFERENCES | _AT_ZERO),
        "references at time 0, batch": ({}, _SMALL_REFERENCES | _AT_ZERO | {"batch": 2}),
        "any other method": ({}, _SMALL_REFERENCES | {"ref_latents_method": "uxo"}),
        "mask, which it does not look at": (
            {},
            {"batch": 2, "height": 6, "width": 6, "attention_mask": _MASK},
        ),
        "fewer heads of the text's keys": (
            {"num_text_heads": 4, "num_text_kv_heads": 2, "text_dim": 64},
            {"height": 8, "width": 6},
        ),
    },
    "qwen_image": {
        "2511 without references": (_EDIT_2511, {}),
        "2511 with references": (_EDIT_2511, _REFERENCES),
        "2511, batch": (_EDIT_2511, _REFERENCES | {"batch": 2}),
        "2511, references by index": (_EDIT_2511, _REFERENCES | {"ref_latents_method": "index"}),
        "2511 with a ControlNet": (
            _EDIT_2511,
            _REFERENCES | {"residuals": {"input": (48, None, 30)}},
        ),
        "references at time 0 in any file": ({}, _REFERENCES | _AT_ZERO),
        "references before the image": ({}, _REFERENCES | {"ref_latents_method": "negative_index"}),
        "layers": (_LAYERED, {"frames": 3, "height": 10, "width": 12}),
        "layers of odd sizes, batch": (
            _LAYERED,
            {"frames": 2, "height": 9, "width": 7, "batch": 2, "length": 33},
        ),
        "layers with a reference": (
            _LAYERED,
            {"frames": 4, "height": 8, "width": 6, "references": ((8, 6),)},
        ),
        "layers with references at time 0": (
            _LAYERED,
            {"frames": 2, "height": 8, "width": 6, "references": ((8, 6), (5, 7))} | _AT_ZERO,
        ),
        "frames, as of pictures that VAEEncode takes for a video": (
            {},
            {"frames": 2, "height": 9, "width": 7, "batch": 2},
        ),
        "references of several frames": (
            {},
            _SMALL_REFERENCES | {"lengths": {"other frames": 2}, "batch": 2},
        ),
        "references of several frames before the image": (
            _LAYERED,
            _SMALL_REFERENCES | {"frames": 2, "lengths": {"other frames": 3}},
        ),
        "captions of different lengths": ({}, {"batch": 2, "attention_mask": _MASK}),
    },
    "ltx2": {
        "2.5": ({}, {}),
        "2.3": (OF_2_3, {"batch": 2, "first": 0.0}),
        "2.0": (OF_2_0, {"batch": 2, "height": 3}),
        "2.0, image to video": (OF_2_0, {"first": 0.0}),
        "other rotary embedding": (_OTHER_ROPE, {"frames": 2, "width": 5, "sound": 3}),
        "odd sizes, batch": ({}, {"batch": 3, "height": 3, "width": 1, "length": 33}),
        "one token": ({}, {"frames": 1, "height": 1, "width": 1, "sound": 1, "length": 1}),
        "without sound": ({}, {"sound": 0, "batch": 2}),
        "without sound, image to video": ({}, {"sound": 0, "first": 0.1}),
        "image to video": ({}, {"batch": 2, "first": 0.0}),
        "a part of the picture": ({}, {"spatial": True, "batch": 2}),
        "a part of the sound": ({}, {"sound_mask": True, "batch": 2}),
        "a part of both": ({}, {"sound_mask": True, "spatial": True, "first": 0.3}),
        "parts of the second item": (
            {},
            {"sound_mask": True, "spatial": True, "masked_from": 1, "batch": 2},
        ),
        "guides": ({}, _GUIDES | {"batch": 2}),
        "guides of a strength": ({}, _GUIDES | {"strengths": (0.5, 1.4)}),
        "a guide with a mask": ({}, _GUIDES | {"strengths": (0.8, 1.0), "masks": (1, None)}),
        "a video as guide": ({}, {"frames": 6, "guides": 3, "strengths": (0.8,), "masks": (17,)}),
        "a short mask": ({}, {"frames": 6, "guides": 3, "strengths": (0.8,), "masks": (2,)}),
        "guides that are not looked at": ({}, _GUIDES | {"strengths": (0.0, 1.0)}),
        "a guide of few tokens": (
            {},
            {"frames": 4, "height": 4, "guides": 1, "dilated": True, "strengths": (0.7,)},
        ),
        "a guide that is dropped": ({}, _GUIDES | {"dropped": (-1,), "strengths": (0.7, 0.9)}),
        "a window without guides": (
            {},
            {"first": 0.0, "keyframe_idxs": torch.zeros(1, 3, 0, 2), "guide_attention_entries": []},
        ),
        "how much to look at guides that are nowhere": (
            {},
            {"guide_attention_entries": [{"strength": 0.5, "pre_filter_count": 6}]},
        ),
        "a voice": ({}, {"reference": 4, "batch": 2}),
        "a voice without sound": ({}, {"reference": 4, "sound": 0}),
        "a voice without sound, image to video": (
            OF_2_0,
            {"reference": 3, "sound": 0, "batch": 2, "first": 0.0},
        ),
        "a voice, and a part of the sound": ({}, {"reference": 4, "sound_mask": True}),
        "generated keyframes": (
            {},
            {
                "frames": 4,
                "generated_keyframes": {
                    "tokens_per_frame": 6,
                    "first_latent_frame": 2,
                    "num_keyframes": 1,
                },
            },
        ),
        "perturbed": ({}, {"transformer_options": {"stg_self_attn_blocks": [1]}}),
        "apart": (
            {},
            {"transformer_options": {"a2v_cross_attn": False, "v2a_cross_attn": False}},
        ),
        "sound is not heard": ({}, {"transformer_options": {"a2v_cross_attn": False}}),
        "video is not seen": ({}, {"transformer_options": {"v2a_cross_attn": False}}),
    },
    "qwen_image_21": {
        "text to image": ({}, _EXACT_TIMES | {"height": 8, "width": 8}),
        "times that bf16 rounds": ({}, _SMALL | {"timesteps": torch.tensor([0.7131])}),
        "odd sizes, gate and up apart": (
            {"fused": False},
            _EXACT_TIMES | {"height": 7, "width": 9, "length": 33},
        ),
        "batch of 3": (
            {},
            {"batch": 3, "height": 4, "width": 6, "length": 1}
            | {"timesteps": torch.tensor([1.0, 0.5, 0.25])},
        ),
        "references behind the text": (
            {},
            _EXACT_TIMES | _SMALL | {"references": ((5, 4), (8, 6))},
        ),
        "references in the text": ({}, _EXACT_TIMES | _SLOTS),
        "references in the text, gate and up apart": ({"fused": False}, _EXACT_TIMES | _SLOTS),
        "references at its ends, batch": (
            {},
            _SMALL
            | {"references": ((5, 4), (8, 6)), "image_slots": [0, 20], "batch": 2}
            | {"timesteps": torch.tensor([0.5, 0.25])},
        ),
        "fewer places than references": (
            {},
            _EXACT_TIMES | _SMALL | {"references": ((5, 4), (4, 6)), "image_slots": [7]},
        ),
        "more places than references": (
            {},
            _EXACT_TIMES | _SMALL | {"references": ((5, 4),), "image_slots": [7, 9]},
        ),
        "places without references": ({}, _EXACT_TIMES | _SMALL | {"image_slots": [7, 9]}),
        "int8_convrot": ({"stored_as": "int8_convrot"}, _EXACT_TIMES | _SLOTS),
        "int8_convrot, gate and up apart": (
            {"stored_as": "int8_convrot", "fused": False},
            _EXACT_TIMES | _SLOTS,
        ),
        "fp8": ({"stored_as": "fp8"}, _EXACT_TIMES | _SLOTS),
    },
}


# Families of which not all cases are kept in bf16, too, and those that are.
IN_BF16 = {"ltx2": ("2.5", "2.3", "2.0", "a part of both", "a guide with a mask")}
# Family → case → batch, tokens and width of a caption that its model makes ready; of the result,
# every so many tokens are kept.
CAPTIONS = {
    "ltx2": {"2.5": (1, 9, 192), "2.0": (2, 1100, 96), "other rotary embedding": (1, 3, 192)}
}
KEPT_TOKENS = 106
MAKERS = {"ltx2": make_ltx2_inputs}  # of families with other inputs than `make_inputs` makes


def inputs_of(family: str, case: str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of the model's forward."""
    changes, arguments = CASES[family][case]
    sizes = {name: value for name, value in changes.items() if name != STORED_AS}
    return MAKERS.get(family, make_inputs)(tiny(family, **sizes), dtype=dtype, **arguments)


def write_case(family: str, path: Path, changes: Mapping[str, Any]) -> Path:
    """The tiny file of a case with these changes."""
    sizes = dict(changes)
    stored_as = sizes.pop(STORED_AS, None)
    # A family of which a case is quantised has the same weights on every CPU, and in every case:
    # the quantised are compared with the others.
    quantises = any(STORED_AS in case for case, _ in CASES[family].values())
    numbers = on_every_cpu if quantises else normal
    if stored_as is None:
        return write_tiny(family, path, numbers=numbers, **sizes)
    from support.quantised_files import write_quantised  # of a package that not every test needs

    whole = write_tiny(family, path.with_suffix(".whole"), numbers=numbers, **sizes)
    return write_quantised(whole, path, stored_as)


def expected(family: str, case: str, dtype: torch.dtype) -> Any:
    """What the newer class computed in that dtype: a tensor, or a list of them."""
    name = _name(case, dtype)
    with safe_open(_path(family), framework="pt") as file:
        if name in file.keys():  # noqa: SIM118  (not a dict)
            return file.get_tensor(name)
        parts = sorted(key for key in file.keys() if key.startswith(f"{name}, "))  # noqa: SIM118
        return [file.get_tensor(key) for key in parts]


def _path(family: str) -> Path:
    return DATA / f"{family}_of_newer_comfyui.safetensors"


def _name(case: str, dtype: torch.dtype) -> str:
    return f"{case} ({str(dtype).removeprefix('torch.')})"


def _computed(family: str, case: str, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    changes = CASES[family][case][0]
    path = write_case(family, folder / "tiny.safetensors", changes)
    inputs = inputs_of(family, case, dtype)
    x, timesteps = inputs.pop("x"), inputs.pop("timesteps")
    if "a_timestep" in inputs:
        timesteps = timesteps, inputs.pop("a_timestep")
    quantised = STORED_AS in changes
    model = native_patcher(path).model.diffusion_model if quantised else native_model(path, dtype)
    with torch.inference_mode():
        found = model(x, timesteps, **inputs)
    name = _name(case, dtype)
    if isinstance(x, torch.Tensor):
        return {name: found.contiguous()}
    parts = [found] if isinstance(found, torch.Tensor) else found
    return {f"{name}, {index}": part.contiguous() for index, part in enumerate(parts)}


def caption_of(family: str, case: str) -> torch.Tensor:
    """What the text encoder might give."""
    return normal(CAPTIONS[family][case], torch.Generator().manual_seed(11))


def expected_caption(family: str, case: str) -> torch.Tensor:
    """What the newer class makes of ``caption_of`` (B, some of the tokens, width), in fp32."""
    with safe_open(_path(family), framework="pt") as file:
        found: torch.Tensor = file.get_tensor(_caption_name(case))
    return found


def _caption_name(case: str) -> str:
    return f"{case} (caption)"


def _connected(family: str, case: str, folder: Path) -> torch.Tensor:
    path = write_tiny(family, folder / "tiny.safetensors", **CASES[family][case][0])
    with torch.inference_mode():
        model = native_model(path, torch.float32)
        found = model.preprocess_text_embeds(caption_of(family, case), unprocessed=True)
    kept: torch.Tensor = found[:, ::KEPT_TOKENS].contiguous()
    return kept


def main() -> None:
    """Write the files."""
    chosen = sys.argv[1:]
    sys.argv = sys.argv[:1]  # ComfyUI reads them, too
    import_comfy()
    from comfyui_version import __version__

    DATA.mkdir(exist_ok=True)
    about = {"comfyui": __version__, "torch": torch.__version__, "made_by": Path(__file__).name}
    with tempfile.TemporaryDirectory() as folder:
        for family, cases in CASES.items():
            if chosen and family not in chosen:
                continue
            results: dict[str, torch.Tensor] = {}
            for case in cases:
                few = case not in IN_BF16.get(family, cases) or STORED_AS in cases[case][0]
                for dtype in DTYPES[:1] if few else DTYPES:
                    results |= _computed(family, case, dtype, Path(folder))
                if case in CAPTIONS.get(family, {}):
                    results[_caption_name(case)] = _connected(family, case, Path(folder))
            save_file(results, _path(family), metadata=about)
            print(_path(family).relative_to(REPOSITORY), _path(family).stat().st_size, about)


if __name__ == "__main__":
    main()
