"""Random numbers of tests."""

from collections.abc import Callable

import torch

# (shape, generator) → numbers of mean 0 and variance 1, fp32.
Numbers = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Whose last bit depends on the CPU's vector instructions: torch takes logarithms of them."""
    return torch.randn(shape, generator=generator)


def on_every_cpu(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Nearly normal numbers, the same bits on every CPU: whole multiples of 2**-5, below 3.6.

    What is quantised needs them where it is compared with results that were stored on another
    machine: one last bit may tip a code, and the results no longer belong to the file. So few bits
    make sums of products exact, too, and a matrix product in whatever order a CPU adds.

    Each is the sum of four uniform integers, whose variance is 4/3 n (n + 1) for integers from -n
    to n: n = 28 makes that 33**2.
    """
    return torch.randint(-28, 29, (4, *shape), generator=generator).sum(0) / 32
