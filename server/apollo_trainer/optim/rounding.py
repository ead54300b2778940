"""How an exact float32 weight becomes the stored one.

Near 1e-5 an update is smaller than half the distance between two bfloat16 numbers, and rounding
to the nearest then loses it, and weight decay with it. Stochastic rounding keeps it on average,
split16 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apollo_trainer.optim.philox import Key, draw_16_bits

RoundingMode = Literal["stochastic", "nearest", "split16"]


@dataclass(frozen=True)
class Rounding:
    """Reads and rounds the weights of one parameter in one step.

    float32 weights are exact in every mode. NaN and infinity pass; a finite value beyond the
    largest finite one saturates.
    """

    mode: RoundingMode
    key: Key
    step: int

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
        bits = draw_16_bits(self.key, self.step, first, value.numel(), value.device)
        return round_stochastic(value, dtype, bits.view(value.shape)), None


def round_stochastic(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds float32 to bfloat16 or float16, up with the probability of what is cut off.

    `bits` are 16 random bits an element, int32, of the shape of `value`.
    """
    if dtype == torch.float16:
        return _stochastic_float16(value, bits)
    raised = (value.view(torch.int32) + bits) & -65536
    rounded = raised.view(torch.float32).to(torch.bfloat16)
    return _saturated(rounded, value)


def _stochastic_float16(value: Tensor, bits: Tensor) -> Tensor:
    """float16 keeps 11 bits, and below 2**-14 a fixed distance of 2**-24."""
    _, exponent = torch.frexp(value)
    quantum = (((exponent - 11).clamp_(min=-24) + 127) << 23).view(torch.float32)
    # 13 of the 16 bits: more would be lost in the 24 bits of a float32 sum.
    fraction = (bits >> 3).to(torch.float32) * 2.0**-13
    magnitude = (value.abs() / quantum + fraction).floor_() * quantum
    return _saturated(magnitude.copysign(value).to(torch.float16), value)


def round_nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 to the nearest number of `dtype`, ties to even."""
    return _saturated(value.to(dtype), value)


def split_halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 into the nearest bfloat16 and the int16 that `join_halves` adds back."""
    bits = value.view(torch.int32)
    # The masked sum stays below the bits of infinity; what is above the largest finite bfloat16
    # is then a lower half that does not fit, and is cut.
    upper = _saturated(((bits + 0x8000) & -65536).view(torch.float32).to(torch.bfloat16), value)
    low = (bits - _as_bits(upper)).clamp_(max=0x7FFF)
    return upper, torch.where(value.isfinite(), low, 0).to(torch.int16)


def join_halves(stored: Tensor, low: Tensor) -> Tensor:
    """The float32 value of a bfloat16 and its int16 lower half."""
    return (_as_bits(stored) + low).view(torch.float32)


def _as_bits(stored: Tensor) -> Tensor:
    return stored.to(torch.float32).view(torch.int32)


def _saturated(rounded: Tensor, value: Tensor) -> Tensor:
    """Undoes an overflow of finite values, and lets what was not finite pass."""
    largest = torch.finfo(rounded.dtype).max
    inside = rounded.clamp(min=-largest, max=largest)
    return torch.where(value.isfinite(), inside, value.to(rounded.dtype))
