"""Sums over a whole step. Those of torch would allocate, when weights are written already."""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["entries", "share"])
def add_up(rows, entries, share, sums, BLOCK: tl.constexpr):
    """A program sums both columns (float64) of its share of the rows into one row."""
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, entries)
    left = tl.zeros((BLOCK,), tl.float64)
    right = tl.zeros((BLOCK,), tl.float64)
    for at in range(first, last, BLOCK):
        i = at + tl.arange(0, BLOCK)
        left += tl.load(rows + 2 * i, mask=i < last, other=0.0)
        right += tl.load(rows + 2 * i + 1, mask=i < last, other=0.0)
    out = sums + 2 * tl.program_id(0)
    tl.store(out, tl.sum(left, 0))
    tl.store(out + 1, tl.sum(right, 0))


@triton.jit(do_not_specialize=["entries"])
def count(flags, entries, total, BLOCK: tl.constexpr):
    """One program sums flags (int32) into an int64."""
    found = tl.zeros((BLOCK,), tl.int64)
    for at in range(0, entries, BLOCK):
        i = at + tl.arange(0, BLOCK)
        found += tl.load(flags + i, mask=i < entries, other=0).to(tl.int64)
    tl.store(total, tl.sum(found, 0))
