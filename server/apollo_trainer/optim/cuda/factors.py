"""The first read of gradients that are factors, G = U^T V: from them what G itself would tell.

A [t, n] is the factor of the channels' side, B [t, k] the other. With Q = P B^T and K = B B^T, the
projection is R = Q A, and |G_j|^2 = a_j^T K a_j. C holds Q and, below it, K; a column is a token.
Experts have columns of their own side by side, from a multiple of 16 on, so that they come in
vectors; up to the next multiple of 16, columns beyond the tokens are zero.
"""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from apollo_trainer.optim.cuda.columns import (
    C_OFFSET,
    C_WIDTH,
    COLS,
    ENDS_PTR,
    FIELDS,
    G_PTR,
    G_ROW,
    INDEX,
    P_OFFSET,
    R_OFFSET,
    RIGHT_PTR,
    RIGHT_ROW,
    ROWS,
    TOKENS,
)
from apollo_trainer.optim.cuda.draw import wide
from apollo_trainer.optim.cuda.project import leave


@triton.jit
def span(d):
    """The first token of a matrix, and how many it has; the device alone knows an expert's."""
    ends, index = tl.load(d + ENDS_PTR), tl.load(d + INDEX)
    stacked = ends != 0
    at = ends.to(tl.pointer_type(tl.int32)) + index
    first = tl.load(at - 1, mask=stacked & (index > 0), other=0).to(tl.int64)
    end = tl.load(at, mask=stacked, other=0).to(tl.int64)
    return first, tl.where(stacked, end, tl.load(d + TOKENS)) - first


@triton.jit
def both(d, G_TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """U and V from a matrix's first token on, the elements from a token to the next, the tokens."""
    first, count = span(d)
    U = tl.load(d + G_PTR).to(tl.pointer_type(G_TYPE))
    V = tl.load(d + RIGHT_PTR).to(tl.pointer_type(G_TYPE))
    u_row, v_row = tl.load(d + G_ROW), tl.load(d + RIGHT_ROW)
    if ALIGNED:
        U, V = tl.multiple_of(U, 16), tl.multiple_of(V, 16)
        u_row, v_row = tl.multiple_of(u_row, 8), tl.multiple_of(v_row, 8)
    return U + wide(first, u_row), u_row, V + wide(first, v_row), v_row, count


@triton.jit
def product(U, u_row, i, rows, V, v_row, j, cols, count, G_TYPE: tl.constexpr,
            BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """A tile of G, rows i and columns j, summed in float32."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    # Offsets within a block of tokens fit 32 bits, which are half the work of 64.
    t = tl.arange(0, BLOCK_T)
    u_at = t[:, None] * u_row.to(tl.int32) + i[None, :]
    v_at = t[:, None] * v_row.to(tl.int32) + j[None, :]
    # Of what is outside the matrix no token is read: one comparison tells, and not three.
    left = count.to(tl.int32)
    u_left, v_left = tl.where(i < rows, left, 0)[None, :], tl.where(j < cols, left, 0)[None, :]
    for t0 in range(0, left, BLOCK_T):
        u = tl.load(U + u_at, mask=t[:, None] < u_left - t0, other=0.0)
        v = tl.load(V + v_at, mask=t[:, None] < v_left - t0, other=0.0)
        acc = _dot(tl.trans(u), v, acc, G_TYPE)
        U += BLOCK_T * u_row
        V += BLOCK_T * v_row
    return acc


@triton.jit
def _columns(C, d):
    """C of a matrix, the elements from a row to the next, and how many columns are stored."""
    first, count = span(d)
    width = tl.multiple_of(tl.load(d + C_WIDTH), 16)
    at = tl.multiple_of(tl.load(d + C_OFFSET), 16) + (first // 16 + tl.load(d + INDEX)) * 16
    return C + at, width, tl.cdiv(count, 16) * 16


@triton.jit(do_not_specialize=["first"])
def gram(desc, P, C, first, RANK_PADDED: tl.constexpr, ROW_CHANNELS: tl.constexpr,
         G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr,
         BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """C; of K, which is symmetric, the tiles on the diagonal and above. Programs share the tiles.

    Axis 0 counts the matrices from `first` on.
    """
    d = desc + (first + tl.program_id(0)).to(tl.int64) * FIELDS
    U, u_row, V, v_row, count = both(d, G_TYPE, ALIGNED)
    if ROW_CHANNELS:
        B, b_row, k = V, v_row, tl.load(d + COLS)
    else:
        B, b_row, k = U, u_row, tl.load(d + ROWS)
    if ALIGNED:
        k = tl.multiple_of(k, 8)
    p = tl.multiple_of(P + tl.load(d + P_OFFSET), 16)
    out, width, stored = _columns(C, d)
    across = tl.cdiv(count, BLOCK_T)
    tiles = (RANK_PADDED // BLOCK_R + across) * across
    for tile in range(tl.program_id(1).to(tl.int64), tiles, tl.num_programs(1).to(tl.int64)):
        block = tile // across
        s = (tile % across) * BLOCK_T + tl.arange(0, BLOCK_T)
        if block < RANK_PADDED // BLOCK_R:
            r = block * BLOCK_R + tl.arange(0, BLOCK_R)
            q = over_k(p, k, r, RANK_PADDED, B, b_row, s, count, k, G_TYPE, BLOCK_R, BLOCK_T,
                       BLOCK_K)  # fmt: skip
            tl.store(out + r[:, None] * width + s[None, :], q, mask=(s < stored)[None, :])
        elif block - RANK_PADDED // BLOCK_R <= tile % across:
            t = (block - RANK_PADDED // BLOCK_R) * BLOCK_T + tl.arange(0, BLOCK_T)
            inner = over_k(B, b_row, t, count, B, b_row, s, count, k, G_TYPE, BLOCK_T, BLOCK_T,
                            BLOCK_K)  # fmt: skip
            mask = (t < count)[:, None] & (s < stored)[None, :]
            tl.store(out + (RANK_PADDED + t)[:, None] * width + s[None, :], inner, mask=mask)


@triton.jit
def over_k(X, x_row, i, x_count, B, b_row, s, count, k, G_TYPE: tl.constexpr,
            BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Rows i of X times rows s of B, transposed."""
    acc = tl.zeros((BLOCK_I, BLOCK_T), tl.float32)
    for k0 in range(0, k, BLOCK_K):
        m = k0 + tl.arange(0, BLOCK_K)
        x_mask = (i < x_count)[:, None] & (m < k)[None, :]
        b_mask = (s < count)[:, None] & (m < k)[None, :]
        x = tl.load(X + i[:, None] * x_row + m[None, :], mask=x_mask, other=0.0)
        b = tl.load(B + s[:, None] * b_row + m[None, :], mask=b_mask, other=0.0)
        acc = _dot(x, tl.trans(b), acc, G_TYPE)
    return acc


@triton.jit(do_not_specialize=["first"])
def project_factors(desc, tiles, C, R, squares, flags, first, RANK_PADDED: tl.constexpr,
                    ROW_CHANNELS: tl.constexpr, G_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_T: tl.constexpr):  # fmt: skip
    """R, kept tile by tile, and |G_j|^2 of each channel; `first` is the first of `tiles`."""
    tiles += 2 * (first + tl.program_id(0)).to(tl.int64)
    matrix, tile = tl.load(tiles).to(tl.int64), tl.load(tiles + 1).to(tl.int64)
    d = desc + matrix * FIELDS
    U, u_row, V, v_row, count = both(d, G_TYPE, ALIGNED)
    if ROW_CHANNELS:
        A, a_row, n = U, u_row, tl.load(d + ROWS)
    else:
        A, a_row, n = V, v_row, tl.load(d + COLS)
    if ALIGNED:
        n = tl.multiple_of(n, 8)
    c, width, stored = _columns(C, d)
    i = tl.arange(0, BLOCK_N)
    j = tile * BLOCK_N + i
    out = R + tl.load(d + R_OFFSET) + tile * (RANK_PADDED * BLOCK_N)
    for r0 in range(0, RANK_PADDED, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        acc = _over_tokens(c, width, r, RANK_PADDED, A, a_row, j, n, 0, count, stored, 1.0,
                           G_TYPE, BLOCK_R, BLOCK_N, BLOCK_T)  # fmt: skip
        tl.store(out + r[:, None] * BLOCK_N + i[None, :], acc)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for s0 in range(0, count, BLOCK_T):
        s = s0 + tl.arange(0, BLOCK_T)
        # What is above K's diagonal stands for what is below it as well.
        acc = _over_tokens(c + RANK_PADDED * width, width, s, count, A, a_row, j, n, s0, count,
                           stored, 2.0, G_TYPE, BLOCK_T, BLOCK_N, BLOCK_T)  # fmt: skip
        mask = (s < count)[:, None] & (j < n)[None, :]
        a = tl.load(A + s[:, None] * a_row + j[None, :], mask=mask, other=0.0)
        square += tl.sum(acc * a.to(tl.float32), 0)
    # Rounding may leave a sum of zero below it. What is not finite shows as infinity.
    square = tl.where(tl.abs(square) < float("inf"), tl.maximum(square, 0.0), float("inf"))
    leave(square, d, matrix, j, n, squares, flags)


@triton.jit
def _over_tokens(c, width, i, rows, A, a_row, j, n, begin, count, stored, weight,
                 G_TYPE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_T: tl.constexpr):  # fmt: skip
    """Rows i of C times A, from token `begin` on; blocks after the first count `weight` times."""
    acc = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    for t0 in range(begin, count, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        x_mask = (i < rows)[:, None] & (t < stored)[None, :]
        a_mask = (t < count)[:, None] & (j < n)[None, :]
        x = tl.load(c + i[:, None] * width + t[None, :], mask=x_mask, other=0.0)
        a = tl.load(A + t[:, None] * a_row + j[None, :], mask=a_mask, other=0.0)
        x = tl.where(t0 > begin, x * weight, x)
        if tl.bfloat16 == G_TYPE:
            # Three bfloat16 hold the bits of a float32: as exact as float32, on tensor cores.
            high = x.to(tl.bfloat16)
            rest = x - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(high, a, tl.dot(middle, a, tl.dot(low, a, acc)))
        else:
            acc = tl.dot(x, a, acc, input_precision="ieee")
    return acc


@triton.jit
def _dot(x, y, acc, G_TYPE: tl.constexpr):
    """x y + acc; one of float32 factors takes P as float32."""
    if tl.bfloat16 == G_TYPE:
        acc = tl.dot(x, y, acc)
    else:
        acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    return acc
