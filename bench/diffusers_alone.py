"""diffusers' own transformer with compiled blocks on one GPU, to compare with.

    python -m bench.diffusers_alone flux 10 1024x1

Prints, last, the rows as JSON. Arguments: model, steps, sizes as SIDExBATCH.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)

from bench.inputs import make_inputs

GIB = 2**30
_CLASSES = {
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "qwen_image": (QwenImageTransformer2DModel, {}),
    "z_image": (ZImageTransformer2DModel, {}),
}


def _build(model: str) -> Any:
    kind, options = _CLASSES[model]
    with torch.device("cuda"):
        module = kind(**options).to(torch.bfloat16).requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)
    return module.eval()


def _arguments(model: str, side: int, batch: int) -> dict[str, Any]:
    """The same sizes as ``make_inputs``, as diffusers wants them."""
    ours = make_inputs(model, side, batch)
    x, text = ours["x"], ours["context"]
    side //= 16
    if model == "z_image":
        return {"x": list(x.unsqueeze(2)), "t": ours["timesteps"], "cap_feats": list(text)}
    tokens = x.reshape(batch, 64, side * side).transpose(1, 2).contiguous()
    common = {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "timestep": ours["timesteps"].bfloat16(),
    }
    if model == "qwen_image":
        return common | {"img_shapes": [[(1, side, side)]] * batch}
    positions = torch.zeros(side, side, 3, device=x.device)
    positions[..., 1] = torch.arange(side, device=x.device)[:, None]
    positions[..., 2] = torch.arange(side, device=x.device)
    return common | {
        "pooled_projections": ours["y"],
        "guidance": ours["guidance"],
        "img_ids": positions.flatten(0, 1),
        "txt_ids": torch.zeros(text.shape[1], 3, device=x.device),
    }


@torch.inference_mode()
def main() -> None:
    """See the module."""
    model, steps, sizes = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    module = _build(model)
    weights = torch.cuda.memory_allocated() / GIB
    module.compile_repeated_blocks(fullgraph=False, dynamic=False)
    rows = []
    for size in sizes:
        side, batch = map(int, size.split("x"))
        arguments = _arguments(model, side, batch)
        times = []
        for _ in range(steps + 3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            module(**arguments, return_dict=False)
            torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - started))
        first_s, times = times[0] / 1000, sorted(times[3:])
        rows.append(
            {
                "model": f"diffusers {model}",
                "tp": 0,
                "side": side,
                "batch": batch,
                "ms_median": round(statistics.median(times), 2),
                "ms_min": round(times[0], 2),
                "ms_p90": round(times[int(0.9 * (len(times) - 1))], 2),
                "first_s": round(first_s, 1),
                "weights_gib": round(weights, 2),
                "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            }
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
