"""From projections to the factor of each channel: moments, scaling and the limiter."""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from apollo_trainer.optim.cuda.columns import (
    ALPHA,
    BETA1,
    BETA2,
    COLS,
    EPS,
    FIELDS,
    GROUP,
    GROWTH,
    LR,
    M_PTR,
    NORM_PTR,
    PART_OFFSET,
    PARTS,
    R_OFFSET,
    ROOT_COLS,
    ROOT_ROWS,
    ROWS,
    S_OFFSET,
    SETTINGS,
    SLOT,
    STACKED,
    STEP_PTR,
    V_PTR,
)
from apollo_trainer.optim.cuda.project import leave_flags


@triton.jit
def _active(flags, matrix, stacked):
    """Whether a matrix is stepped: finite, and, in a stack, reached by any token."""
    bad = tl.load(flags + 2 * matrix)
    reached = tl.load(flags + 2 * matrix + 1)
    return (bad == 0) & ((stacked == 0) | (reached == 1))


@triton.jit
def moments(desc, tiles, settings, R, squares, factors, parts, flags, corrections,
            root_rank, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, TILE: tl.constexpr,
            ROW_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, MINI: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """Both moments, and s_j = |R~_j| / |R_j|; or, for MINI, the sums that make the one s."""
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    block = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64)
    d = desc + matrix * FIELDS
    n = tl.load(d + ROWS) if ROW_CHANNELS else tl.load(d + COLS)
    written = tl.where(_active(flags, matrix, tl.load(d + STACKED)), n, 0)
    m = tl.load(d + M_PTR).to(tl.pointer_type(tl.float32))
    v = tl.load(d + V_PTR).to(tl.pointer_type(tl.float32))
    settings += tl.load(d + GROUP) * SETTINGS
    beta1, beta2 = tl.load(settings + BETA1), tl.load(settings + BETA2)
    correction1 = tl.load(corrections + 2 * matrix)
    correction2 = tl.load(corrections + 2 * matrix + 1)
    b1, b2 = beta1.to(tl.float32), beta2.to(tl.float32)
    c1, c2 = (1.0 - beta1).to(tl.float32), (1.0 - beta2).to(tl.float32)
    eps = tl.load(settings + EPS).to(tl.float32)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # R lies tile by tile, as `project` stores it.
    tile = R + tl.load(d + R_OFFSET) + (j // TILE * (RANK_PADDED * TILE) + j % TILE)[None, :]
    plain = tl.zeros((BLOCK_N,), tl.float32)
    scaled = tl.zeros((BLOCK_N,), tl.float32)
    for r0 in tl.static_range(0, RANK, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        at = r[:, None] * n + j[None, :]
        mask = (r < RANK)[:, None] & (j < n)[None, :]
        x = tl.load(tile + r[:, None] * TILE, mask=mask, other=0.0) * root_rank
        new_m = tl.load(m + at, mask=mask, other=0.0) * b1 + x * c1
        new_v = tl.load(v + at, mask=mask, other=0.0) * b2 + x * x * c2
        kept = (r < RANK)[:, None] & (j < written)[None, :]
        tl.store(m + at, new_m, mask=kept)
        tl.store(v + at, new_v, mask=kept)
        direction = (new_m * correction1) / (tl.sqrt(new_v * correction2) + eps)
        scaled += tl.sum(tl.where(mask, direction * direction, 0.0), 0)
        plain += tl.sum(x * x, 0)
    square = tl.load(squares + tl.load(d + S_OFFSET) + j, mask=j < n, other=0.0)
    part = parts + (tl.load(d + PART_OFFSET) + block) * 3
    if MINI:
        tl.store(part, tl.sum(scaled, 0))
        tl.store(part + 1, tl.sum(plain, 0))
        tl.store(part + 2, tl.sum(square, 0))
    else:
        s = tl.where(plain > 0, tl.sqrt(scaled) / tl.sqrt(plain), 0.0)
        tl.store(factors + tl.load(d + S_OFFSET) + j, s, mask=j < n)
        tl.store(part, tl.sum(s * s * square, 0))


@triton.jit
def _sum_parts(parts, count, column: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(parts + i * 3 + column, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def add_parts(desc, parts, totals, BLOCK: tl.constexpr):
    """A program a matrix: its parts' sums, three to be added over ranks."""
    matrix = tl.program_id(0).to(tl.int64)
    d = desc + matrix * FIELDS
    part, count = parts + tl.load(d + PART_OFFSET) * 3, tl.load(d + PARTS)
    for column in tl.static_range(3):
        tl.store(totals + 3 * matrix + column, _sum_parts(part, count, column, BLOCK))


@triton.jit
def limit(desc, settings, parts, flags, rates, slot_flags, norm_floor, MINI: tl.constexpr,
          TOTALS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program a matrix: the limiter, lr * alpha * factor, the step count, what is skipped.

    TOTALS: `parts` has been added up, to three numbers a matrix.
    """
    matrix = tl.program_id(0).to(tl.int64)
    d = desc + matrix * FIELDS
    if TOTALS:
        part, count = parts + 3 * matrix, 1
    else:
        part, count = parts + tl.load(d + PART_OFFSET) * 3, tl.load(d + PARTS)
    if MINI:
        plain = _sum_parts(part, count, 1, BLOCK)
        s = tl.where(plain > 0, tl.sqrt(_sum_parts(part, count, 0, BLOCK)) / tl.sqrt(plain), 0.0)
        norm = s * tl.sqrt(_sum_parts(part, count, 2, BLOCK))
    else:
        norm = tl.sqrt(_sum_parts(part, count, 0, BLOCK))
        s = norm * 0.0 + 1.0
    active = _active(flags, matrix, tl.load(d + STACKED)) & (norm < float("inf"))
    settings += tl.load(d + GROUP) * SETTINGS
    growth = tl.load(settings + GROWTH).to(tl.float32)
    previous_at = tl.load(d + NORM_PTR).to(tl.pointer_type(tl.float32))
    previous = tl.load(previous_at)
    elements = (tl.load(d + ROOT_ROWS) * tl.load(d + ROOT_COLS)).to(tl.float32)
    cap = tl.maximum(previous * growth, norm_floor * tl.sqrt(elements))
    limited = (growth > 0) & (previous > 0) & (norm > cap)
    factor = tl.where(limited, cap / norm, 1.0)
    tl.store(previous_at, tl.where(active & (norm > 0), norm * factor, previous))
    step_at = tl.load(d + STEP_PTR).to(tl.pointer_type(tl.int64))
    tl.store(step_at, tl.load(step_at) + active.to(tl.int64))
    alpha = tl.load(d + ALPHA).to(tl.float64, bitcast=True)
    lr = (tl.load(settings + LR) * alpha).to(tl.float32)
    tl.store(rates + 2 * matrix, s * factor * lr)
    tl.store(rates + 2 * matrix + 1, active.to(tl.float32))
    bad = (tl.load(flags + 2 * matrix) != 0) | ~(norm < float("inf"))
    tl.atomic_max(slot_flags + tl.load(d + SLOT), bad.to(tl.int32))


@triton.jit
def flag(desc, tiles, squares, flags, ROW_CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr):
    """What the squares of channels tell of a matrix, once those of all ranks are added."""
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    d = desc + matrix * FIELDS
    n = tl.load(d + ROWS) if ROW_CHANNELS else tl.load(d + COLS)
    j = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    square = tl.load(squares + tl.load(d + S_OFFSET) + j, mask=j < n, other=0.0)
    leave_flags(square, matrix, j, n, flags)
