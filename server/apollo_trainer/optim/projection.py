"""The random projection P of APOLLO (arXiv 2412.05270, Algorithm 1), regenerated at every step.

P is not kept: for a matrix [m, n] it would be r * m numbers, a fifth of the state. Making it costs
less than the product P G that follows.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from apollo_trainer.optim.philox import Key, draw_words

_LN2 = math.log(2.0)
_SQRT_HALF = math.sqrt(0.5)
_LOG_TERMS = 8  # |t| <= 0.172, so the first term left out is below 1e-14
_TURN_TERMS = 8  # |x| <= pi / 4, so the first term left out is below 1e-14


def draw_projection(key: Key, window: int, rank: int, width: int, device: torch.device) -> Tensor:
    """Returns P [rank, width], float32, with entries N(0, 1 / rank).

    `window` is the number of the refresh, (step - 1) // proj_refresh. Entry i in row-major order
    is number i % 4 of Philox block i // 4. The normals come from additions, products, quotients
    and square roots in float64, which IEEE 754 rounds in one way only, and are then rounded to
    float32: P has the same bits on a CPU and on a GPU. A kernel that makes P itself must not fuse
    products into additions.
    """
    count = rank * width
    words = draw_words(key, window, 0, (count + 3) // 4, device)
    values = _normals(words).mul_(1.0 / math.sqrt(rank)).to(torch.float32)
    return values.flatten()[:count].view(rank, width)


def _normals(words: Tensor) -> Tensor:
    """Box-Muller on words [k, 4], two pairs a row: float64 [k, 4]."""
    pairs = words.view(-1, 2, 2)
    radius = (_log_uniform(pairs[..., 0]) * -2.0).sqrt_()
    cosine, sine = _unit_circle(pairs[..., 1])
    return torch.stack((radius * cosine, radius * sine), dim=-1).view(-1, 4)


def _log_uniform(word: Tensor) -> Tensor:
    """Natural logarithm of u = (word + 1/2) / 2**32, float64, by the series of artanh.

    `torch.log` differs in its last bit between devices.
    """
    fraction, exponent = torch.frexp((word.to(torch.float64) + 0.5) * 2.0**-32)
    low = fraction < _SQRT_HALF
    fraction = torch.where(low, fraction * 2.0, fraction)
    exponent = exponent.to(torch.float64) - low.to(torch.float64)
    t = (fraction - 1.0) / (fraction + 1.0)
    series = _polynomial(t * t, [1.0 / (2 * k + 1) for k in range(_LOG_TERMS)])
    return exponent * _LN2 + series * t * 2.0


def _unit_circle(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float64, of an angle uniform on the circle, by their Taylor series.

    The two high bits of the word are the quarter turn; the rest lies within pi / 4 of zero.
    """
    x = ((word & 0x3FFFFFFF).to(torch.float64) + (0.5 - 2.0**29)) * (math.pi * 2.0**-31)
    square = x * x
    signs = [(-1.0) ** k for k in range(_TURN_TERMS)]
    cosine = _polynomial(square, [s / math.factorial(2 * k) for k, s in enumerate(signs)])
    sine = _polynomial(square, [s / math.factorial(2 * k + 1) for k, s in enumerate(signs)]) * x
    quarter = word >> 30
    odd, back = (quarter & 1).bool(), quarter >= 2
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    return torch.where(back, -cosine, cosine), torch.where(back, -sine, sine)


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """Horner's rule; each product and each sum is rounded by itself."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value.mul_(x).add_(coefficient)
    return value


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
