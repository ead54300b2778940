"""The first read of the gradients: their projections, and the squares of their channels."""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from apollo_trainer.optim.cuda.columns import (
    COLS,
    FIELDS,
    G_COL,
    G_PTR,
    G_ROW,
    P_OFFSET,
    R_OFFSET,
    ROWS,
    S_OFFSET,
)


@triton.jit
def project(desc, tiles, P, R, squares, flags, RANK_PADDED: tl.constexpr,
            ROW_CHANNELS: tl.constexpr, G_UNIT: tl.constexpr, G_TYPE: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """R = T G for the unscaled T, and |G_j|^2 of each channel; for gradients of any layout."""
    matrix, first, n, k, g_n, g_k, d = _tile(desc, tiles, ROW_CHANNELS, BLOCK_N)
    G = tl.load(d + G_PTR).to(tl.pointer_type(G_TYPE))
    p_base = P + tl.load(d + P_OFFSET)
    j = first + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK_PADDED)
    acc = tl.zeros((RANK_PADDED, BLOCK_N), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for k0 in range(0, k, BLOCK_K):
        i = k0 + tl.arange(0, BLOCK_K)
        p = tl.load(p_base + r[:, None] * k + i[None, :], mask=(i < k)[None, :], other=0.0)
        if G_UNIT == 1:  # the elements of a channel are neighbours
            mask = (j < n)[:, None] & (i < k)[None, :]
            g = tl.load(G + j[:, None] * g_n + i[None, :], mask=mask, other=0.0)
            g32 = g.to(tl.float32)
            square += tl.sum(g32 * g32, 1)
            g = tl.trans(g)
        else:
            mask = (i < k)[:, None] & (j < n)[None, :]
            if G_UNIT == 2:
                g = tl.load(G + i[:, None] * g_k + j[None, :], mask=mask, other=0.0)
            else:
                g = tl.load(G + i[:, None] * g_k + j[None, :] * g_n, mask=mask, other=0.0)
            g32 = g.to(tl.float32)
            square += tl.sum(g32 * g32, 0)
        if tl.bfloat16 == G_TYPE:
            acc = tl.dot(p, g, acc)
        else:
            acc = tl.dot(p.to(tl.float32), g.to(tl.float32), acc, input_precision="ieee")
    _store(acc, R, d, tiles, RANK_PADDED, BLOCK_N)
    leave(square, d, matrix, j, n, squares, flags)


@triton.jit
def project_aligned(desc, tiles, P, R, squares, flags, RANK_PADDED: tl.constexpr,
                    ROW_CHANNELS: tl.constexpr, G_UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """The same for aligned bfloat16: tiles come by the copy engine, through descriptors.

    A thread adds up squares of its own; LANES partial sums of a channel are added at the end.
    Sums across threads in the loop would stall the tensor cores.
    """
    matrix, first, n, k, g_n, g_k, d = _tile(desc, tiles, ROW_CHANNELS, BLOCK_N)
    first32, n32, k32 = first.to(tl.int32), n.to(tl.int32), k.to(tl.int32)
    G = tl.multiple_of(tl.load(d + G_PTR).to(tl.pointer_type(tl.bfloat16)), 16)
    p_base = tl.multiple_of(P + tl.load(d + P_OFFSET), 16)
    p_tiles = tl.make_tensor_descriptor(p_base, [RANK_PADDED, k32], [k, 1], [RANK_PADDED, BLOCK_K])
    if G_UNIT == 1:
        g_tiles = tl.make_tensor_descriptor(G, [n32, k32], [g_n, 1], [BLOCK_N, BLOCK_K])
        sums = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    else:
        g_tiles = tl.make_tensor_descriptor(G, [k32, n32], [g_k, 1], [BLOCK_K, BLOCK_N])
        sums = tl.zeros((LANES, BLOCK_N), tl.float32)
    acc = tl.zeros((RANK_PADDED, BLOCK_N), tl.float32)
    for k0 in range(0, k32, BLOCK_K):
        p = p_tiles.load([0, k0])
        if G_UNIT == 1:
            g = g_tiles.load([first32, k0])
            acc = tl.dot(p, tl.trans(g), acc)
            g32 = g.to(tl.float32)
            sums += tl.sum(tl.reshape(g32 * g32, (BLOCK_N, BLOCK_K // 8, 8)), 2)
        else:
            g = g_tiles.load([k0, first32])
            acc = tl.dot(p, g, acc)
            g32 = g.to(tl.float32)
            sums += tl.sum(tl.reshape(g32 * g32, (BLOCK_K // LANES, LANES, BLOCK_N)), 0)
    _store(acc, R, d, tiles, RANK_PADDED, BLOCK_N)
    square = tl.sum(sums, 1 if G_UNIT == 1 else 0)
    leave(square, d, matrix, first + tl.arange(0, BLOCK_N), n, squares, flags)


@triton.jit
def _tile(desc, tiles, ROW_CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The matrix, its first channel here, its sides n and k, and the gradient's strides."""
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    first = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK_N
    d = desc + matrix * FIELDS
    rows, cols = tl.load(d + ROWS), tl.load(d + COLS)
    if ROW_CHANNELS:
        n, k, g_n, g_k = rows, cols, tl.load(d + G_ROW), tl.load(d + G_COL)
    else:
        n, k, g_n, g_k = cols, rows, tl.load(d + G_COL), tl.load(d + G_ROW)
    return matrix, first, n, k, g_n, g_k, d


@triton.jit
def _store(acc, R, d, tiles, RANK_PADDED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores a tile of R, whole: R is kept tile by tile, so that no number needs a comparison."""
    r, i = tl.arange(0, RANK_PADDED), tl.arange(0, BLOCK_N)
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64)
    out = R + tl.load(d + R_OFFSET) + tile * (RANK_PADDED * BLOCK_N)
    tl.store(out + r[:, None] * BLOCK_N + i[None, :], acc)


@triton.jit
def leave(square, d, matrix, j, n, squares, flags):
    """Stores the squares of channels j, and what they tell about the matrix."""
    tl.store(squares + tl.load(d + S_OFFSET) + j, square, mask=j < n)
    leave_flags(square, matrix, j, n, flags)


@triton.jit
def leave_flags(square, matrix, j, n, flags):
    """Stores whether channels j are finite, and whether any of them is reached."""
    # Squares of NaN and infinity stay such; so a flag of each kind says all about the matrix.
    bad = (j < n) & ~(square < float("inf"))
    tl.atomic_max(flags + 2 * matrix, tl.max(bad.to(tl.int32), 0))
    tl.atomic_max(flags + 2 * matrix + 1, tl.max((square > 0).to(tl.int32), 0))
