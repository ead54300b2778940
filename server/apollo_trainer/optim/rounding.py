"""How an exact float32 weight becomes the stored one.

Near 1e-5 an update is smaller than half the distance between two bfloat16 numbers, and rounding
to the nearest then loses it, and weight decay with it. Stochastic rounding keeps it on average,
split16 exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apollo_trainer.optim.philox import Key, draw_16_bits, draw_lines
from apollo_trainer.parallel.parts import Lines

RoundingMode = Literal["stochastic", "nearest", "split16"]
_UPPER = -0x10000  # the upper 16 of 32 bits


@dataclass(frozen=True)
class Rounding:
    """Reads and rounds the weights of one parameter in one step.

    float32 weights are exact in every mode. NaN and infinity pass; a finite value beyond the
    largest finite one saturates.

    Attributes:
        lines: the numbers of the elements of a rank's part in the whole parameter, by which they
            are drawn; None where it has all of it.
    """

    mode: RoundingMode
    key: Key
    step: int
    lines: Lines | None = None

    def read(self, stored: Tensor, low: Tensor | None) -> Tensor:
        """Returns the exact weights, float32; `low` is the int16 lower half under split16."""
        if low is None:
            return stored.to(torch.float32)
        return join_halves(stored, low)

    def round(self, value: Tensor, dtype: torch.dtype, first: int) -> tuple[Tensor, Tensor | None]:
        """Returns `value` as stored in `dtype`, and the lower half under split16.

        `value` is float32; its elements are numbers `first`, `first + 1`, ... of the parameter,
        counted in row-major order of its own shape.
        """
        if dtype == torch.float32:
            return value, None
        if self.mode == "split16":
            return split_halves(value)
        if self.mode == "nearest":
            return round_nearest(value, dtype), None
        bits = self._bits(first, value.numel(), value.device)
        return round_stochastic(value, dtype, bits.view(value.shape)), None

    def _bits(self, first: int, count: int, device: torch.device) -> Tensor:
        """16 random bits for elements of what is stepped: int32 [count]."""
        if self.lines is None:
            return draw_16_bits(self.key, self.step, first, count, device)
        pieces = self.lines.pieces(first, count)
        drawn = (draw_lines(self.key, self.step, starts.to(device), n) for starts, n in pieces)
        return torch.cat([bits.flatten() for bits in drawn])


def round_stochastic(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds float32 to bfloat16 or float16, up with the probability of what is cut off.

    `bits` are 16 random bits an element, int32, of the shape of `value`.
    """
    value = _within_range(value, dtype)
    if dtype == torch.float16:
        return _stochastic_float16(value, bits)
    raised = (value.view(torch.int32) + bits).bitwise_and_(_UPPER)
    return raised.view(torch.float32).to(torch.bfloat16)


def _stochastic_float16(value: Tensor, bits: Tensor) -> Tensor:
    """float16 keeps 11 bits, and below 2**-14 a fixed distance of 2**-24."""
    _, exponent = torch.frexp(value)
    quantum = (((exponent - 11).clamp_(min=-24) + 127) << 23).view(torch.float32)
    # 13 of the 16 bits: more would be lost in the 24 bits of a float32 sum.
    fraction = (bits >> 3).to(torch.float32) * 2.0**-13
    magnitude = (value.abs() / quantum + fraction).floor_() * quantum
    rounded = magnitude.copysign(value).to(torch.float16)
    return torch.where(value.isfinite(), rounded, value.to(torch.float16))


def round_nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 to the nearest number of `dtype`, ties to even."""
    return _within_range(value, dtype).to(dtype)


def split_halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 into the nearest bfloat16 and the int16 that `join_halves` adds back."""
    value = _within_range(value, torch.bfloat16)
    bits = value.view(torch.int32)
    upper = (bits + 0x8000).bitwise_and_(_UPPER)
    low = (bits - upper).to(torch.int16)
    return upper.view(torch.float32).to(torch.bfloat16), low


def join_halves(stored: Tensor, low: Tensor) -> Tensor:
    """The float32 value of a bfloat16 and its int16 lower half."""
    return (stored.to(torch.float32).view(torch.int32) + low).view(torch.float32)


def _within_range(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cuts finite values at the largest of `dtype`; NaN and infinity pass.

    NaN leaves as 0x7FC00000: the bits of a GPU's own NaN would overflow when bits are added.
    """
    largest = torch.finfo(dtype).max
    cut = torch.nan_to_num_(value.clamp(min=-largest, max=largest), nan=math.nan)
    return torch.where(value.abs() == math.inf, value, cut)
