"""Rounding as in `rounding.py`, on the device."""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def within_range(new):
    """Cuts finite values at the largest bfloat16, as `rounding._within_range` does."""
    largest = 3.3895313892515355e38
    return tl.where(tl.abs(new) < float("inf"), tl.clamp(new, -largest, largest), new)


@triton.jit
def round_up(new, bits, W_TYPE: tl.constexpr):
    """float32 to bfloat16, up with the probability of what is cut off.

    Beyond the largest bfloat16 nothing is added: what is cut off then leaves the largest one of a
    finite number, and infinity and NaN as they are.
    """
    whole = new.to(tl.int32, bitcast=True)
    raised = tl.where(tl.abs(new) <= 3.3895313892515355e38, whole + bits.to(tl.int32), whole)
    return (raised >> 16).to(tl.int16).to(W_TYPE, bitcast=True)


@triton.jit
def widen(stored):
    """bfloat16 to float32 by its bits, which is one instruction even of the upper of two."""
    if tl.float32 == stored.dtype:
        wide = stored
    else:
        wide = (stored.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return wide


@triton.jit
def join_halves(stored, low):
    """The exact float32 of a bfloat16 and its int16 lower half, which comes as int32."""
    whole = stored.to(tl.float32).to(tl.int32, bitcast=True) + low
    return whole.to(tl.float32, bitcast=True)


@triton.jit
def split_halves(new):
    """The nearest bfloat16, as float32, and the int16 that `join_halves` adds back."""
    whole = within_range(new).to(tl.int32, bitcast=True)
    upper = (whole + 0x8000) & -65536
    return upper.to(tl.float32, bitcast=True), (whole - upper).to(tl.int16)


@triton.jit
def change(before, after):
    """Of every eight neighbours, the sum of the squared changes, and how many there are.

    Eight neighbours are a thread's own: to sum them moves nothing between threads. What is outside
    the matrix was read as zero, and is zero still.
    """
    difference = widen(after) - widen(before)
    # As an integer the smallest float is 1, and so is the smaller of it and any but zero.
    one = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)
    # A change of zero with other bits is -0 for +0: too rare to count apart.
    ones = tl.minimum(tl.abs(difference), one).to(tl.int32, bitcast=True)
    return tl.sum(_eights(difference * difference), 2), tl.sum(_eights(ones), 2)


@triton.jit
def _eights(x):
    return tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8))
