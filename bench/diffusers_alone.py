"""diffusers' own transformer with compiled blocks on one GPU, to compare with.

Run by `bench.step --diffusers` in a process of its own: its arguments are the model file, how many
evaluations to time, and a file of the cases: side, batch, inputs and what to expect of them.
Prints, last, the rows as JSON. On the CPU the blocks are not compiled.
"""

import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import diffusers
import torch

from bench.errors import relative_error
from tp_runtime.recognise import CheckpointInfo, inspect_checkpoint, open_checkpoint

GIB = 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UPS = 3


def _build(info: CheckpointInfo) -> torch.nn.Module:
    """The module with the file's weights."""
    torch.set_default_dtype(torch.bfloat16)  # fp32 first would take twice the memory
    try:
        with torch.device(DEVICE):
            module = getattr(diffusers, info.family.diffusers_class)(**info.sizes.for_diffusers())
    finally:
        torch.set_default_dtype(torch.float32)
    table = info.sizes.table
    with open_checkpoint(info.path) as file:
        for name, parameter in module.requires_grad_(False).named_parameters():
            place = table.places[name]
            rows = file.read(place.name, (place.start, place.stop), None)
            if name in table.swapped:
                rows = torch.cat(rows.chunk(2)[::-1])
            if rows.numel() == parameter.numel():
                rows = rows.view_as(parameter)  # what is a vector in ComfyUI may be a table
            parameter.data = rows.to(DEVICE)  # a small model may have sizes that are fixed there
    return module.eval()


def _call(module: Any, inputs: dict[str, Any], patch: int) -> Callable[[], torch.Tensor]:
    """An evaluation of these inputs, as diffusers' pipelines do it.

    Squares of ``patch`` × ``patch`` numbers of a latent's channel are a token's.
    """
    x, text, batch = inputs["x"], inputs["context"], len(inputs["x"])
    takes = inspect.signature(module.forward).parameters
    if not isinstance(x, torch.Tensor):
        raise SystemExit("A model of several latents is not measured alone: leave --diffusers out.")
    if "cap_feats" in takes:  # one picture at a time, the time backwards
        images, texts, times = list(x.unsqueeze(2)), list(text), 1 - inputs["timesteps"]
        return lambda: -torch.stack(module(images, times, texts, return_dict=False)[0]).squeeze(2)
    if "encoder_hidden_states_image" in takes:  # videos as they are
        times = inputs["timesteps"]
        return lambda: module(x, times, text, return_dict=False)[0]
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    # A token is channels, rows, columns.
    patches = x.reshape(batch, -1, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    num_axes = len((module.rotary_emb if "position_ids" in takes else module.pos_embed).axes_dim)
    positions = torch.zeros(rows, columns, num_axes, device=x.device)
    positions[..., 1] = torch.arange(rows, device=x.device)[:, None]
    positions[..., 2] = torch.arange(columns, device=x.device)
    text_positions = torch.zeros(text.shape[1], num_axes, device=x.device)
    if num_axes > 3:  # a token of text has its place on an axis of its own
        text_positions[:, 3] = torch.arange(text.shape[1], device=x.device)
    if "position_ids" in takes:  # of the text encoder's layers, one behind another
        text = text.unflatten(-1, (module.config.num_text_layers, -1))
    known = {
        "hidden_states": patches.reshape(batch, rows * columns, -1),
        "encoder_hidden_states": text,
        "timestep": inputs["timesteps"],
        "img_shapes": [[(1, rows, columns)]] * batch,
        "pooled_projections": inputs.get("y"),
        "guidance": inputs.get("guidance"),
        "img_ids": positions.flatten(0, 1),
        "txt_ids": text_positions,
        "position_ids": torch.cat((text_positions, positions.flatten(0, 1))),
    }
    given = {name: value for name, value in known.items() if name in takes and value is not None}
    if "img_mask" in takes:  # its keys and values of the text once
        given |= _of_one_sequence(module, given, takes["kv_cache"].annotation)

    def evaluate() -> torch.Tensor:
        tokens = module(**given, return_dict=False)[0]
        found = tokens.reshape(batch, rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return found.reshape(x.shape)

    return evaluate


def _of_one_sequence(module: Any, given: dict[str, Any], cache_or_none: Any) -> dict[str, Any]:
    """What a model also takes whose text and image are one sequence, of which the text is kept."""
    text, num_tokens = given["encoder_hidden_states"], given["hidden_states"].shape[1]
    slots = torch.arange(
        text.shape[1] + num_tokens // 4, device=text.device
    )  # one for 2 x 2 tokens
    more = {
        "img_mask": (slots >= text.shape[1]).expand(len(text), -1),
        "kv_cache": get_args(cache_or_none)[0](len(module.transformer_blocks)),
    }
    module(**given, **more, kv_cache_mode="extract")
    return more | {"kv_cache_mode": "cached"}


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def main() -> None:
    """See the module."""
    path, steps, cases = sys.argv[1], int(sys.argv[2]), torch.load(sys.argv[3])
    info = inspect_checkpoint(path)
    module = _build(info)
    patch = info.sizes.geometry.patch[-1]
    weights = sum(parameter.nbytes for parameter in module.parameters()) / GIB
    if DEVICE == "cuda":
        module.compile_repeated_blocks(fullgraph=False, dynamic=False)
        torch.cuda.reset_peak_memory_stats()
    rows = []
    for side, batch, all_inputs, all_expected in cases:
        calls = [_call(module, inputs, patch) for inputs in all_inputs]
        times, results = [], []
        for index in range(steps + WARM_UPS):
            _synchronize()
            started = time.perf_counter()
            results.append(calls[index % len(calls)]())
            _synchronize()
            times.append(1000 * (time.perf_counter() - started))
        error = max(
            relative_error(result, all_expected[index % len(calls)])
            for index, result in enumerate(results)
        )
        first_s, times = times[0] / 1000, sorted(times[WARM_UPS:])
        peak = round(torch.cuda.max_memory_allocated() / GIB, 2) if DEVICE == "cuda" else None
        rows.append(
            {
                "model": f"diffusers {info.family.name}",
                "tp": 0,
                "side": side,
                "batch": batch,
                "error": float(f"{error:.2e}"),
                "ms_median": round(statistics.median(times), 2),
                "ms_min": round(times[0], 2),
                "ms_p90": round(times[int(0.9 * (len(times) - 1))], 2),
                "first_s": round(first_s, 1),
                "weights_gib": round(weights, 3),
                "peak_gib": peak,
            }
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
