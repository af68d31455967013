"""Attention of an optimised step: the fastest kernel that this GPU has. GPUs only.

Which one that is depends on the device and on the shape, so it is measured, once a shape on a
machine, in the step before the one that is recorded. ``TP_RUNTIME_ATTENTION`` names one instead.
"""

import logging
import statistics
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import AttentionKernel
from ..errors import InputError
from .kernel_choices import KernelChoices

logger = logging.getLogger("tp_runtime.gpu.attention")

# q, k, v as FastAttention takes them → (B, L, N, K)
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_WARM_UPS, _RUNS = 2, 5

# What torch can be asked for, best first for a Hopper GPU; the later take what the earlier refuse.
_TORCH_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class FastAttention:
    """Attention over this rank's heads: q (B, L, N, K), k and v (B, L', N', K) → (B, L, N, K).

    N is a multiple of N', the key and value heads, which neighbouring query heads share.
    """

    def __init__(self, kernel: AttentionKernel, choices: KernelChoices | None) -> None:
        """``choices``: those of this machine. Raises InputError if there is no such kernel here."""
        self._asked_for = kernel
        self._choices = choices
        self._chosen: dict[Hashable, Kernel] = {}
        if kernel == "flash3":
            reason = _why_no_flash3()
            if reason is not None:
                raise InputError(
                    f"TP_RUNTIME_ATTENTION=flash3, but FlashAttention 3 cannot be used: {reason}. "
                    "Set it to auto, cudnn or sdpa."
                )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """``mask`` as ``models.layers.attention`` takes it."""
        if mask is not None:
            return _of_torch(_TORCH_ORDER, q, k, v, mask)
        key = *(part.shape for part in (q, k, v)), *(part.stride() for part in (q, k, v)), q.dtype
        if key not in self._chosen:
            self._chosen[key] = self._choose(q, k, v, str(key))
        return self._chosen[key](q, k, v)

    def _choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shapes: str) -> Kernel:
        candidates = self._candidates(q, k)
        if len(candidates) == 1:
            return next(iter(candidates.values()))
        key = f"{torch.cuda.get_device_name()}, torch {version('torch')}, vLLM {version('vllm')}: "
        key += f"{', '.join(candidates)} for {shapes}"
        if self._choices is not None and (known := self._choices.get(key)) in candidates:
            return candidates[known]
        taken = {name: _milliseconds(kernel, q, k, v) for name, kernel in candidates.items()}
        best = min(taken, key=taken.__getitem__)
        logger.info("attention, %s: %s (ms: %s)", key, best, taken)
        if self._choices is not None and (kept := self._choices.keep(key, best)) in candidates:
            best = kept
        return candidates[best]

    def _candidates(self, q: torch.Tensor, k: torch.Tensor) -> dict[str, Kernel]:
        """What may compute these shapes, by name."""
        half = q.dtype in (torch.float16, torch.bfloat16)
        if self._asked_for == "fixed":
            if half and _why_no_flash3() is None:
                return {"flash3": _flash3(q, k)}
            return {"cudnn": partial(_of_torch, _TORCH_ORDER)}
        if self._asked_for in ("cudnn", "flash3") and not half:
            logger.warning(
                "TP_RUNTIME_ATTENTION=%s is for fp16 and bf16; attention in %s is torch's.",
                *(self._asked_for, q.dtype),
            )
        if self._asked_for == "sdpa" or (self._asked_for == "cudnn" and not half):
            return {"sdpa": partial(_of_torch, None)}
        found: dict[str, Kernel] = {}
        if self._asked_for in ("auto", "cudnn"):
            found["cudnn"] = partial(_of_torch, _TORCH_ORDER)
        if self._asked_for in ("auto", "flash3") and half and _why_no_flash3() is None:
            found["flash3"] = _flash3(q, k)
        return found or {"sdpa": partial(_of_torch, None)}


def _of_torch(
    order: Sequence[SDPBackend] | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch's, of the first kernel in ``order`` that takes the shape; None: of its own choice."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    compute = partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=grouped)
    if order is None:
        return compute(q, k, v).transpose(1, 2)
    with sdpa_kernel(list(order), set_priority=True):
        return compute(q, k, v).transpose(1, 2)


def _flash3(q_like: torch.Tensor, k_like: torch.Tensor) -> Kernel:
    """FlashAttention 3, which vLLM brings along, for tensors of these shapes."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    # Where each picture's tokens begin. Recorded evaluations read them: they live as long as
    # the kernel.
    of_queries, of_keys = (
        torch.arange(batch + 1, dtype=torch.int32, device=q_like.device) * length
        for batch, length in (q_like.shape[:2], k_like.shape[:2])
    )

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = (part.flatten(0, 1) for part in (q, k, v))
        found = flash_attn_varlen_func(
            *rows,
            max_seqlen_q=q.shape[1],
            cu_seqlens_q=of_queries,
            max_seqlen_k=k.shape[1],
            cu_seqlens_k=of_keys,
            fa_version=3,
        )
        return found.view_as(q)

    return run


def _why_no_flash3() -> str | None:
    if torch.cuda.get_device_capability()[0] != 9:  # vLLM would ask the machine's first GPU
        return "this GPU is not of the Hopper generation"
    try:
        from vllm.vllm_flash_attn import fa_version_unsupported_reason, is_fa_version_supported
    except ImportError as error:  # a vLLM that was built without it
        return str(error)
    if is_fa_version_supported(3):
        return None
    return fa_version_unsupported_reason(3) or "vLLM does not say why"


def _milliseconds(kernel: Kernel, *inputs: torch.Tensor) -> float:
    """The median time of a few runs."""
    times = []
    for _ in range(_WARM_UPS + _RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel(*inputs)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times[_WARM_UPS:]), 4)
