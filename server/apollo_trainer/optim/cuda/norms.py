"""The norm of gradients that are factors, before anything is made of them.

|G|^2 = <U U^T, V V^T>, arXiv 1510.01799: two Gram matrices that are never stored.
"""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from apollo_trainer.optim.cuda.columns import COLS, FIELDS, ROWS
from apollo_trainer.optim.cuda.factors import both, over_k


@triton.jit
def squares(desc, out, G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """Parts of |G|^2 of each matrix, float32 [matrices, programs]; axis 0 counts the matrices.

    Both Gram matrices are symmetric: tiles off the diagonal stand for two.
    """
    matrix = tl.program_id(0).to(tl.int64)
    d = desc + matrix * FIELDS
    U, u_row, V, v_row, count = both(d, G_TYPE, ALIGNED)
    rows, cols = tl.load(d + ROWS), tl.load(d + COLS)
    if ALIGNED:
        rows, cols = tl.multiple_of(rows, 8), tl.multiple_of(cols, 8)
    across = tl.cdiv(count, BLOCK_T)
    total = tl.zeros((), tl.float32)
    first, programs = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    for tile in range(first, across * across, programs):
        i, j = tile // across, tile % across
        if i <= j:
            t, s = i * BLOCK_T + tl.arange(0, BLOCK_T), j * BLOCK_T + tl.arange(0, BLOCK_T)
            left = over_k(U, u_row, t, count, U, u_row, s, count, rows, G_TYPE, BLOCK_T, BLOCK_T,
                           BLOCK_K)  # fmt: skip
            right = over_k(V, v_row, t, count, V, v_row, s, count, cols, G_TYPE, BLOCK_T, BLOCK_T,
                            BLOCK_K)  # fmt: skip
            total += tl.sum(left * right) * tl.where(i == j, 1.0, 2.0)
    tl.store(out + matrix * programs + first, total)
