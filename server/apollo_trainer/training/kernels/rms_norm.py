"""RMS norms on CUDA: y = (w + added) x / sqrt(mean(x^2) + eps), and the gradients of w and x.

torch's kernel gives each row a block of threads, which is most of a GPU left idle where rows are
heads of 128. Root mean squares are found anew on the way back, so that nothing but x is kept.
"""

# Triton reads the source of its functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LONGEST = 16384
_ELEMENTS = 2048  # of a tile of short rows
_PROGRAMS = 264  # of a backward pass: two for each multiprocessor of an H100 or H200
_COLUMNS = 32


@triton.jit
def norm_forward(X, W, OUT, rows, size, eps, added, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [rows, size], without gaps."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = tl.arange(0, BLOCK)
    mask = (r < rows)[:, None] & (i < size)[None, :]
    at = r[:, None] * size + i[None, :]
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(W + i, mask=i < size, other=0.0).to(tl.float32) + added
    scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)
    tl.store(OUT + at, (x * scale[:, None] * w[None, :]).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward(
    X, W, DY, DX, PARTS, rows, size, eps, added, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """DX, and each program's sum of the weight's gradient: float32 [programs, size]."""
    i = tl.arange(0, BLOCK)
    w = tl.load(W + i, mask=i < size, other=0.0).to(tl.float32) + added
    of_weight = tl.zeros((BLOCK,), tl.float32)
    step = tl.num_programs(0) * BLOCK_ROWS
    for first in range(tl.program_id(0) * BLOCK_ROWS, rows, step):
        r = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (r < rows)[:, None] & (i < size)[None, :]
        at = r[:, None] * size + i[None, :]
        x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)[:, None]
        y, dw = x * scale, dy * w[None, :]
        dx = scale * (dw - y * (tl.sum(dw * y, 1) / size)[:, None])
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
        of_weight += tl.sum(dy * y, 0)
    tl.store(PARTS + tl.program_id(0).to(tl.int64) * size + i, of_weight, mask=i < size)


@triton.jit
def norm_sum(PARTS, OUT, count, size, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums rows of `PARTS` [count, size]."""
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, count, BLOCK):
        r = first + tl.arange(0, BLOCK)
        mask = (r < count)[:, None] & (i < size)[None, :]
        total += tl.sum(tl.load(PARTS + r[:, None] * size + i[None, :], mask=mask, other=0.0), 0)
    tl.store(OUT + i, total.to(OUT.dtype.element_ty), mask=i < size)


def rms_norm(x: Tensor, weight: Tensor, eps: float, added: float = 0.0) -> Tensor:
    """x [..., size] and its weight [size], of float dtypes; the result is of x's."""
    result: Tensor = _Norm.apply(x, weight, eps, added)
    return result


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take x [..., size] and its weight."""
    return weight.is_contiguous() and 0 < weight.numel() <= _LONGEST and x.numel() > 0


def _tile(rows: int, size: int) -> tuple[int, dict[str, int]]:
    block = triton.next_power_of_2(size)
    of_rows = max(1, min(_ELEMENTS // block, triton.next_power_of_2(rows)))
    warps = max(1, min(16, of_rows * block // 512))
    return of_rows, {"BLOCK_ROWS": of_rows, "BLOCK": block, "num_warps": warps}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, added: float) -> Tensor:
        x, size = x.contiguous(), weight.numel()
        rows, out = x.numel() // size, torch.empty_like(x)
        of_rows, launch = _tile(rows, size)
        given = (rows, size, eps, added)
        norm_forward[(triton.cdiv(rows, of_rows),)](x, weight, out, *given, **launch)
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.added = eps, added
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), dy = ctx.saved_tensors, grads[0].contiguous()
        size, dx, of_weight = weight.numel(), torch.empty_like(x), torch.empty_like(weight)
        rows = x.numel() // size
        of_rows, launch = _tile(rows, size)
        programs = min(_PROGRAMS, triton.cdiv(rows, of_rows))
        parts = torch.empty(programs, size, device=x.device)
        given = (rows, size, ctx.eps, ctx.added)
        norm_backward[(programs,)](x, weight, dy, dx, parts, *given, **launch)
        norm_sum[(triton.cdiv(size, _COLUMNS),)](
            parts, of_weight, programs, size, BLOCK=64, COLUMNS=_COLUMNS
        )
        return dx, of_weight, None, None
