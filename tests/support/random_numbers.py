"""Random numbers that are the same bits on every CPU.

`torch.randn` takes logarithms and cosines whose last bit depends on the CPU's vector instructions:
one such bit, in a weight that is then quantised, may tip a code, and the results that were stored
on another machine no longer belong to the file.
"""

import torch


def normal(shape: tuple[int, ...], generator: torch.Generator, bits: int = 10) -> torch.Tensor:
    """Nearly normal numbers of mean 0 and variance 1, fp32: whole multiples of 2**-bits.

    Each is the sum of four uniform integers, whose variance is 4/3 n (n + 1) for integers from -n
    to n: n = √¾ 2**bits makes that 4**bits. None is above 3.6. With few bits sums of products are
    exact, too, and so is a matrix product in whatever order a CPU adds.
    """
    n = round(0.75**0.5 * 2**bits)
    return torch.randint(-n, n + 1, (4, *shape), generator=generator).sum(0) / 2**bits
