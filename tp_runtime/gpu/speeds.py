"""How fast a GPU computes, and reads from the host, for predictions."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

SIDE = 4096  # of matrices that are multiplied, and tokens that look at one another
HEADS, HEAD_DIM = 8, 128
ADDED_BYTES = 2**26  # of a tensor that is added to another one: more than caches hold
READ_BYTES = 2**26  # from the host's memory: a layer's, about
REPEATS, ROUNDS = 4, 3  # the first round also chooses kernels


def speed_times(device: torch.device, side: int = SIDE) -> dict[str, float]:
    """Seconds of a product, an attention and a sum of two tensors in bf16, and their sizes."""
    a, b = (torch.zeros(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    q, k, v = (
        torch.zeros(1, HEADS, side, HEAD_DIM, dtype=torch.bfloat16, device=device) for _ in range(3)
    )
    added = ADDED_BYTES * side // SIDE
    x, y, z = (torch.zeros(added // 2, dtype=torch.bfloat16, device=device) for _ in range(3))
    works: dict[str, Callable[[], object]] = {
        "product_s": functools.partial(torch.mm, a, b),
        "attention_s": functools.partial(F.scaled_dot_product_attention, q, k, v),
        "sum_s": functools.partial(torch.add, x, y, out=z),
    }
    found = {name: least_seconds(work, device, REPEATS, ROUNDS) for name, work in works.items()}
    sizes = {"side": side, "heads": HEADS, "head_dim": HEAD_DIM, "added_bytes": added}
    return found | sizes | {"multiprocessors": _multiprocessors(device)}


def host_times(device: torch.device, size: int = READ_BYTES) -> dict[str, float]:
    """Seconds of a copy of so many bytes from the host's memory, page-locked for a GPU."""
    there, here = (torch.zeros(size, dtype=torch.uint8, device=place) for place in ("cpu", device))
    copy = functools.partial(here.copy_, there, non_blocking=True)
    with _page_locked(there, device):
        seconds = least_seconds(copy, device, REPEATS, ROUNDS)
    return {"bytes": size, "copy_s": seconds}


@contextlib.contextmanager
def _page_locked(tensor: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Not by torch, which would keep the memory."""
    if device.type != "cuda":
        yield
        return
    cudart, address = torch.cuda.cudart(), tensor.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, tensor.nbytes, 0))
    try:
        yield
    finally:
        torch.cuda.check_error(cudart.cudaHostUnregister(address))


def least_seconds(
    work: Callable[[], object], device: torch.device, repeats: int, rounds: int
) -> float:
    """The least time of one of several, one behind another."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - began) / repeats)
    return min(times)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
