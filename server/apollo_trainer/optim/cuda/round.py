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
    """float32 to bfloat16, up with the probability of what is cut off."""
    raised = (new.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -65536
    finite = tl.abs(new) < float("inf")
    return tl.where(finite, raised.to(tl.float32, bitcast=True), new).to(W_TYPE)


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
