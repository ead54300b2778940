"""The random projection P of APOLLO (arXiv 2412.05270, Algorithm 1), regenerated at every step.

P is not kept: for a matrix [m, n] it would be r * m numbers, a fifth of the state.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from apollo_trainer.optim.philox import Key, draw_16_bits

LEVELS = 2**16


def draw_projection(key: Key, window: int, rank: int, width: int, device: torch.device) -> Tensor:
    """Returns P [rank, width], float32, with entries N(0, 1 / rank).

    `window` is the number of the refresh, (step - 1) // proj_refresh. Entry i in row-major order
    is the quantile that the 16 random bits of element i point at.
    """
    bits = draw_16_bits(key, window, 0, rank * width, device)
    entries = normal_quantiles(device)[bits].to(torch.float32)
    return entries.mul_(1.0 / math.sqrt(rank)).view(rank, width)


@lru_cache(maxsize=16)
def normal_quantiles(device: torch.device) -> Tensor:
    """The quantiles (k + 1/2) / 65536 of the standard normal distribution, bfloat16 [65536].

    Drawing from a table needs no logarithm or cosine, whose last bits differ between devices: P is
    the same everywhere. Its entries are bfloat16, so that their products with a bfloat16 gradient
    are exact in float32, on tensor cores too.
    """
    normal = NormalDist()
    quantiles = [normal.inv_cdf((k + 0.5) / LEVELS) for k in range(LEVELS)]
    return torch.tensor(quantiles, dtype=torch.float64).to(torch.bfloat16).to(device)


def draw_apollo_torch_projection(
    index: int, window: int, rank: int, width: int, tall: bool, device: torch.device
) -> Tensor:
    """Returns the P [rank, width] that apollo-torch draws on a CPU for its parameter `index`.

    `index` counts the parameters from 1. `tall` tells whether the larger side is dimension 0.
    """
    generator = torch.Generator().manual_seed(_apollo_torch_seed(index, window))
    shape = (rank, width) if tall else (width, rank)
    normals = torch.randn(shape, generator=generator) / math.sqrt(rank)
    return (normals if tall else normals.t()).to(device)


@lru_cache(maxsize=4096)
def _apollo_torch_seed(index: int, window: int) -> int:
    """The published seed chain: the next seed is the 15th integer that the last one draws."""
    seed = index
    for _ in range(window):
        generator = torch.Generator().manual_seed(seed)
        seed = int(torch.randint(0, 2**63 - 1, (15,), generator=generator)[-1])
    return seed
