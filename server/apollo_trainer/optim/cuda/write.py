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
    G_COL,
    G_PTR,
    G_ROW,
    GROUP,
    LOW_PTR,
    ROWS,
    S_OFFSET,
    SETTINGS,
    W_COL,
    W_PTR,
    W_ROW,
)
from apollo_trainer.optim.cuda.draw import bits_of_tile, draws, wide
from apollo_trainer.optim.cuda.factors import both, product
from apollo_trainer.optim.cuda.round import (
    change,
    join_halves,
    round_up,
    split_halves,
    widen,
    within_range,
)


@triton.jit
def write(desc, tiles, settings, factors, rates, number, changes,
          W_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ROW_CHANNELS: tl.constexpr,
          W_UNIT: tl.constexpr, G_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
          FACTORED: tl.constexpr, CUT: tl.constexpr, MINI: tl.constexpr, STOCHASTIC: tl.constexpr,
          SPLIT: tl.constexpr, MEASURE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
          BLOCK_COLS: tl.constexpr, BLOCK_T: tl.constexpr, REPEATS: tl.constexpr,
          STAGES: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """W <- W (1 - lr lambda) - lr alpha G diag(s), rounded: the second read of G.

    *_UNIT: 1 where the elements of a row are neighbours, 2 those of a column, 0 neither.
    FACTORED: a tile of G is the product of its factors' columns, and is in no memory; it is written
    in PARTS of its columns, 1, 2 or 4, since its rounding takes as many registers again.
    """
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    d = desc + matrix * FIELDS
    rows, cols = tl.load(d + ROWS).to(tl.int32), tl.load(d + COLS).to(tl.int32)
    W, w_row, w_col = _place(d + W_PTR, d + W_ROW, d + W_COL, W_TYPE, ALIGNED)
    if FACTORED:
        U, u_row, V, v_row, count = both(d, G_TYPE, ALIGNED)
    else:
        G, g_row, g_col = _place(d + G_PTR, d + G_ROW, d + G_COL, G_TYPE, ALIGNED)
    decay = tl.load(settings + tl.load(d + GROUP) * SETTINGS + DECAY).to(tl.float32)
    s = factors + tl.load(d + S_OFFSET)
    drawn, low = draws(d, number, STOCHASTIC), tl.load(d + LOW_PTR)
    across = tl.cdiv(cols, BLOCK_COLS)
    first_row = (tile // across) * (BLOCK_ROWS * REPEATS)
    first_col = (tile % across) * BLOCK_COLS
    # A matrix that is not stepped has no elements to write.
    stepped = tl.load(rates + 2 * matrix + 1) > 0.5
    rate = tl.where(stepped, -tl.load(rates + 2 * matrix), 0.0)
    rows, cols = tl.where(stepped, rows, 0), tl.where(stepped, cols, 0)
    if ALIGNED:
        rows, cols = tl.multiple_of(rows, 8), tl.multiple_of(cols, 8)
    WIDTH: tl.constexpr = BLOCK_COLS // PARTS
    squared = tl.zeros((BLOCK_ROWS, WIDTH // 8), tl.float32)
    changed = tl.zeros((BLOCK_ROWS, WIDTH // 8), tl.int32)
    for repeat in tl.range(0, REPEATS, num_stages=STAGES):
        a = first_row + repeat * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        if FACTORED:
            b = first_col + tl.arange(0, BLOCK_COLS)
            g = product(U, u_row, a, rows, V, v_row, b, cols, count, G_TYPE, BLOCK_ROWS, BLOCK_COLS,
                        BLOCK_T)  # fmt: skip
        else:
            g = _read(G, g_row, g_col, a, rows, first_col, cols, G_UNIT, BLOCK_COLS).to(tl.float32)
        stored = _read(W, w_row, w_col, a, rows, first_col, cols, W_UNIT, WIDTH)
        by_row = _scale(s, a, rows, rate, MINI or not ROW_CHANNELS)[:, None]
        parts = _columns_of(g, BLOCK_ROWS, BLOCK_COLS, PARTS)
        for part in tl.static_range(PARTS):
            # Memory takes long: it is asked for the next part before this one is written.
            now, col = stored, first_col + part * WIDTH
            if part + 1 < PARTS:
                stored = _read(W, w_row, w_col, a, rows, col + WIDTH, cols, W_UNIT, WIDTH)
            # A branch keeps the parts apart: what is drawn for all at once needs more registers.
            if PARTS == 1 or col < cols:
                by = by_row
                if not (MINI or ROW_CHANNELS):
                    by = _scale(s, col + tl.arange(0, WIDTH), cols, rate, False)[None, :]
                after = _write_part(
                    parts[part] * by, now, W, w_row, w_col, a, rows, col, cols, decay, drawn, low,
                    W_TYPE, W_UNIT, ALIGNED, CUT, STOCHASTIC, SPLIT, BLOCK_ROWS, WIDTH)  # fmt: skip
                if MEASURE:
                    squares, ones = change(now, after)
                    squared += squares
                    changed += ones
    if MEASURE:
        out = changes + 2 * tl.program_id(0).to(tl.int64)
        tl.store(out, tl.sum(squared).to(tl.float64))
        tl.store(out + 1, tl.sum(changed).to(tl.float64))


@triton.jit
def _place(pointer, row, col, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a matrix begins, and the elements from a row and from a column to the next."""
    X = tl.load(pointer).to(tl.pointer_type(TYPE))
    row, col = tl.load(row).to(tl.uint32), tl.load(col).to(tl.uint32)
    if ALIGNED:
        X, row = tl.multiple_of(X, 16), tl.multiple_of(row, 8)
    return X, row, col


@triton.jit
def _tile(X, row, col, a, rows, first_col, cols, UNIT: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Where rows a and the columns from the first on lie, and which of them there are."""
    b = first_col + tl.arange(0, BLOCK_COLS)
    mask = (a < rows)[:, None] & (b < cols)[None, :]
    if UNIT == 1:
        at = X + wide(a, row)[:, None] + b[None, :]
    elif UNIT == 2:
        at = X + a[:, None] + wide(b, col)[None, :]
    else:
        at = X + wide(a, row)[:, None] + wide(b, col)[None, :]
    return at, mask


@triton.jit
def _read(X, row, col, a, rows, first_col, cols, UNIT: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """A tile; what is outside the matrix is zero."""
    at, mask = _tile(X, row, col, a, rows, first_col, cols, UNIT, BLOCK_COLS)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _scale(s, at, count, rate, ALIKE: tl.constexpr):
    """What the gradients of channels are multiplied by."""
    scale = tl.zeros(at.shape, tl.float32) + rate
    if not ALIKE:
        scale *= tl.load(s + at, mask=at < count, other=0.0)
    return scale


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
def _write_part(update, stored, W, w_row, w_col, a, rows, first_col, cols, decay, drawn, low,
                W_TYPE: tl.constexpr, W_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
                CUT: tl.constexpr, STOCHASTIC: tl.constexpr, SPLIT: tl.constexpr,
                BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    """Writes one tile, and returns what was written."""
    at, mask = _tile(W, w_row, w_col, a, rows, first_col, cols, W_UNIT, BLOCK_COLS)
    old = widen(stored)
    if SPLIT:
        low_at = low.to(tl.pointer_type(tl.int16)) + wide(a, cols)[:, None]
        low_at = low_at + (first_col + tl.arange(0, BLOCK_COLS))[None, :]
        old = join_halves(stored, tl.load(low_at, mask=mask, other=0).to(tl.int32))
    new = tl.fma(old, decay, update)
    if tl.float32 == W_TYPE:
        rounded = new
    elif SPLIT:
        upper, low_half = split_halves(new)
        rounded = upper.to(W_TYPE)
        tl.store(low_at, low_half, mask=mask)
    elif STOCHASTIC:
        bits = bits_of_tile(drawn, a, first_col, cols, ALIGNED, BLOCK_ROWS, BLOCK_COLS, CUT)
        rounded = round_up(new, bits, W_TYPE)
    else:
        rounded = within_range(new).to(W_TYPE)
    tl.store(at, rounded, mask=mask)
    return rounded
