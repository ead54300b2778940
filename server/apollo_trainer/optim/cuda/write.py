"""The second read of the gradients: the weights are written."""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from apollo_trainer.optim.cuda.columns import (
    COLS,
    DECAY,
    FIELDS,
    FIRST,
    G_COL,
    G_PTR,
    G_ROW,
    GROUP,
    LOW_PTR,
    ROUND_KEY,
    ROWS,
    S_OFFSET,
    SETTINGS,
    W_COL,
    W_PTR,
    W_ROW,
)
from apollo_trainer.optim.cuda.draw import bits16, bits16_of_blocks
from apollo_trainer.optim.cuda.factors import both, product
from apollo_trainer.optim.cuda.round import join_halves, round_up, split_halves, within_range


@triton.jit
def write(desc, tiles, settings, factors, rates, number, changes,
          W_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ROW_CHANNELS: tl.constexpr,
          W_UNIT: tl.constexpr, G_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
          FACTORED: tl.constexpr, MINI: tl.constexpr, STOCHASTIC: tl.constexpr,
          SPLIT: tl.constexpr, MEASURE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
          BLOCK_COLS: tl.constexpr, BLOCK_T: tl.constexpr, REPEATS: tl.constexpr,
          STAGES: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """W <- W (1 - lr lambda) - lr alpha G diag(s), rounded: the second read of G.

    *_UNIT: 1 where the elements of a row are neighbours, 2 those of a column, 0 neither.
    FACTORED: a tile of G is the product of its factors' columns, and is in no memory; it is written
    in PARTS of its columns, 1, 2 or 4, since its rounding takes as many registers again.
    """
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64)
    d = desc + matrix * FIELDS
    rows, cols = tl.load(d + ROWS), tl.load(d + COLS)
    W, w_row, w_col = _place(d + W_PTR, d + W_ROW, d + W_COL, W_TYPE, ALIGNED)
    if ALIGNED:
        rows, cols = tl.multiple_of(rows, 8), tl.multiple_of(cols, 8)
    if FACTORED:
        U, u_row, V, v_row, count = both(d, G_TYPE, ALIGNED)
    else:
        G, g_row, g_col = _place(d + G_PTR, d + G_ROW, d + G_COL, G_TYPE, ALIGNED)
    rate = tl.load(rates + 2 * matrix)
    # A matrix that is not stepped has no rows to write.
    rows = tl.where(tl.load(rates + 2 * matrix + 1) > 0.5, rows, 0)
    across = tl.cdiv(cols, BLOCK_COLS)
    first_row = (tile // across) * (BLOCK_ROWS * REPEATS)
    first_col = (tile % across) * BLOCK_COLS
    decay = tl.load(settings + tl.load(d + GROUP) * SETTINGS + DECAY).to(tl.float32)
    squared = tl.zeros((BLOCK_ROWS,), tl.float32)
    changed = tl.zeros((BLOCK_ROWS,), tl.int32)
    for repeat in tl.range(0, REPEATS, num_stages=STAGES):
        a = first_row + repeat * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        b = first_col + tl.arange(0, BLOCK_COLS)
        if FACTORED:
            g = product(U, u_row, a, rows, V, v_row, b, cols, count, G_TYPE, BLOCK_ROWS, BLOCK_COLS,
                        BLOCK_T)  # fmt: skip
        else:
            mask = (a < rows)[:, None] & (b < cols)[None, :]
            g = tl.load(_tile(G, g_row, g_col, a, b, G_UNIT), mask=mask, other=0.0).to(tl.float32)
        parts = _columns_of(g, BLOCK_ROWS, BLOCK_COLS, PARTS)
        for part in tl.static_range(PARTS):
            squares, changes_of = _write_part(
                parts[part], d, W, w_row, w_col, a, rows, first_col + part * (BLOCK_COLS // PARTS),
                cols, factors, rate, decay, number, W_TYPE, ROW_CHANNELS, W_UNIT, ALIGNED, MINI,
                STOCHASTIC, SPLIT, MEASURE, BLOCK_ROWS, BLOCK_COLS // PARTS)  # fmt: skip
            squared += squares
            changed += changes_of
    if MEASURE:
        out = changes + 2 * tl.program_id(0).to(tl.int64)
        tl.store(out, tl.sum(squared.to(tl.float64), 0))
        tl.store(out + 1, tl.sum(changed, 0).to(tl.float64))


@triton.jit
def _place(pointer, row, col, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a matrix begins, and the elements from a row and from a column to the next."""
    X, row, col = tl.load(pointer).to(tl.pointer_type(TYPE)), tl.load(row), tl.load(col)
    if ALIGNED:
        X, row = tl.multiple_of(X, 16), tl.multiple_of(row, 8)
    return X, row, col


@triton.jit
def _tile(X, row, col, a, b, UNIT: tl.constexpr):
    """Where rows a and columns b lie."""
    if UNIT == 1:
        at = X + a[:, None] * row + b[None, :]
    elif UNIT == 2:
        at = X + a[:, None] + b[None, :] * col
    else:
        at = X + a[:, None] * row + b[None, :] * col
    return at


@triton.jit
def _columns_of(g, ROWS_OF: tl.constexpr, COLS_OF: tl.constexpr, PARTS: tl.constexpr):
    """A tile's columns in so many parts, a tuple."""
    if PARTS == 1:
        parts = (g,)
    elif PARTS == 2:
        parts = _halves(g, ROWS_OF, COLS_OF)
    else:
        left, right = _halves(g, ROWS_OF, COLS_OF)
        first, second = _halves(left, ROWS_OF, COLS_OF // 2)
        third, fourth = _halves(right, ROWS_OF, COLS_OF // 2)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def _halves(x, ROWS_OF: tl.constexpr, COLS_OF: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (ROWS_OF, 2, COLS_OF // 2)), (0, 2, 1)))


@triton.jit
def _write_part(g, d, W, w_row, w_col, a, rows, first_col, cols, factors, rate, decay, number,
                W_TYPE: tl.constexpr, ROW_CHANNELS: tl.constexpr, W_UNIT: tl.constexpr,
                ALIGNED: tl.constexpr, MINI: tl.constexpr, STOCHASTIC: tl.constexpr,
                SPLIT: tl.constexpr, MEASURE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                BLOCK_COLS: tl.constexpr):  # fmt: skip
    """Writes one tile; by row the sum of the squared changes, and how many elements changed."""
    b = first_col + tl.arange(0, BLOCK_COLS)
    mask = (a < rows)[:, None] & (b < cols)[None, :]
    at = _tile(W, w_row, w_col, a, b, W_UNIT)
    stored = tl.load(at, mask=mask, other=0.0)
    if MINI:
        update = g * rate
    elif ROW_CHANNELS:
        s = tl.load(factors + tl.load(d + S_OFFSET) + a, mask=a < rows, other=0.0)
        update = g * (s * rate)[:, None]
    else:
        s = tl.load(factors + tl.load(d + S_OFFSET) + b, mask=b < cols, other=0.0)
        update = g * (s * rate)[None, :]
    old = stored.to(tl.float32)
    if SPLIT:
        low_at = tl.load(d + LOW_PTR).to(tl.pointer_type(tl.int16))
        low_at = low_at + a[:, None] * cols + b[None, :]
        old = join_halves(stored, tl.load(low_at, mask=mask, other=0).to(tl.int32))
    new = old * decay - update
    if tl.float32 == W_TYPE:
        rounded = new
    elif SPLIT:
        upper, low = split_halves(new)
        rounded = upper.to(W_TYPE)
        tl.store(low_at, low, mask=mask)
    elif STOCHASTIC:
        k0, k1 = tl.load(d + ROUND_KEY), tl.load(d + ROUND_KEY + 1)
        base = tl.load(d + FIRST) + a * cols
        step = tl.load(number)
        if ALIGNED:
            blocks = (first_col >> 3) + tl.arange(0, BLOCK_COLS // 8)
            bits = bits16_of_blocks((base >> 3)[:, None] + blocks[None, :], step, k0, k1)
            bits = tl.reshape(bits, (BLOCK_ROWS, BLOCK_COLS))
        else:
            bits = bits16(base[:, None] + b[None, :], step, k0, k1)
        rounded = round_up(within_range(new), bits, W_TYPE)
    else:
        rounded = within_range(new).to(W_TYPE)
    tl.store(at, rounded, mask=mask)
    squared = tl.zeros((BLOCK_ROWS,), tl.float32)
    changed = tl.zeros((BLOCK_ROWS,), tl.int32)
    if MEASURE:
        difference = tl.where(mask, rounded.to(tl.float32) - stored.to(tl.float32), 0.0)
        squared = tl.sum(difference * difference, 1)
        # A difference of zero with other bits is -0 for +0: too rare to count apart.
        changed = tl.sum((difference != 0).to(tl.int32), 1)
    return squared, changed
