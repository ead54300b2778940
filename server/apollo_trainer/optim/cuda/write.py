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
          STAGES: tl.constexpr):  # fmt: skip
    """W <- W (1 - lr lambda) - lr alpha G diag(s), rounded: the second read of G.

    *_UNIT: 1 where the elements of a row are neighbours, 2 those of a column, 0 neither.
    FACTORED: a tile of G is the product of its factors' columns, and is in no memory.
    """
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64)
    d = desc + matrix * FIELDS
    rows, cols = tl.load(d + ROWS), tl.load(d + COLS)
    w_row, w_col = tl.load(d + W_ROW), tl.load(d + W_COL)
    g_row, g_col = tl.load(d + G_ROW), tl.load(d + G_COL)
    W = tl.load(d + W_PTR).to(tl.pointer_type(W_TYPE))
    G = tl.load(d + G_PTR).to(tl.pointer_type(G_TYPE))
    if ALIGNED:
        W, G = tl.multiple_of(W, 16), tl.multiple_of(G, 16)
        rows, cols = tl.multiple_of(rows, 8), tl.multiple_of(cols, 8)
        w_row, g_row = tl.multiple_of(w_row, 8), tl.multiple_of(g_row, 8)
    if FACTORED:
        U, u_row, V, v_row, count = both(d, G_TYPE, ALIGNED)
    rate = tl.load(rates + 2 * matrix)
    # A matrix that is not stepped has no rows to write.
    rows = tl.where(tl.load(rates + 2 * matrix + 1) > 0.5, rows, 0)
    across = tl.cdiv(cols, BLOCK_COLS)
    first_row = (tile // across) * (BLOCK_ROWS * REPEATS)
    first_col = (tile % across) * BLOCK_COLS
    b = first_col + tl.arange(0, BLOCK_COLS)
    settings += tl.load(d + GROUP) * SETTINGS
    decay = tl.load(settings + DECAY).to(tl.float32)
    squared = tl.zeros((BLOCK_ROWS,), tl.float32)
    changed = tl.zeros((BLOCK_ROWS,), tl.int32)
    for repeat in tl.range(0, REPEATS, num_stages=STAGES):
        a = first_row + repeat * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (a < rows)[:, None] & (b < cols)[None, :]
        if W_UNIT == 1:
            at = W + a[:, None] * w_row + b[None, :]
        elif W_UNIT == 2:
            at = W + a[:, None] + b[None, :] * w_col
        else:
            at = W + a[:, None] * w_row + b[None, :] * w_col
        if G_UNIT == 1:
            g_at = G + a[:, None] * g_row + b[None, :]
        elif G_UNIT == 2:
            g_at = G + a[:, None] + b[None, :] * g_col
        else:
            g_at = G + a[:, None] * g_row + b[None, :] * g_col
        stored = tl.load(at, mask=mask, other=0.0)
        if FACTORED:
            g = product(U, u_row, a, rows, V, v_row, b, cols, count, G_TYPE, BLOCK_ROWS, BLOCK_COLS,
                        BLOCK_T)  # fmt: skip
        else:
            g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
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
        if MEASURE:
            difference = tl.where(mask, rounded.to(tl.float32) - stored.to(tl.float32), 0.0)
            squared += tl.sum(difference * difference, 1)
            # A difference of zero with other bits is -0 for +0: too rare to count apart.
            changed += tl.sum((difference != 0).to(tl.int32), 1)
    if MEASURE:
        out = changes + 2 * tl.program_id(0).to(tl.int64)
        tl.store(out, tl.sum(squared.to(tl.float64), 0))
        tl.store(out + 1, tl.sum(changed, 0).to(tl.float64))
