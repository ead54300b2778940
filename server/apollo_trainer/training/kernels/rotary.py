"""Rotary positions as one kernel each way, where transformers launches ten.

Of Qwen3's 58 forward kernels in a layer ten rotate queries and keys. What a model's own function
says is compared first; one that rotates otherwise is left as it is. Where there are fewer cosines
than a head is long, those that have none are copied.
"""

# Triton reads the source of its functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_trainer.training.functions import replace_function

_NAME = "apply_rotary_pos_emb"
_HEADS = 8  # that a program turns at once


@triton.jit
def rotate(X, OUT, COS, SIN, heads, width, x_b, x_h, x_s, o_b, o_h, o_s, c_b, c_s,
           HALF: tl.constexpr, PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
           HEADS: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """One place of one row: [heads, 2 HALF] turned by its cosines and sines, or turned back; what
    is beyond, [heads, REST], as it is."""
    b, s = tl.program_id(0).to(tl.int64) // width, tl.program_id(0).to(tl.int64) % width
    i = tl.arange(0, PADDED)
    inside = i < HALF
    at = b * c_b + s * c_s + i
    c1 = tl.load(COS + at, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(COS + at + HALF, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(SIN + at, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(SIN + at + HALF, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, heads, HEADS):
        h = first + tl.arange(0, HEADS)
        mask = (h < heads)[:, None] & inside[None, :]
        x = X + b * x_b + s * x_s + h[:, None] * x_h + i[None, :]
        x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
        if BACK:
            y1, y2 = x1 * c1[None, :] + x2 * s2[None, :], x2 * c2[None, :] - x1 * s1[None, :]
        else:
            y1, y2 = x1 * c1[None, :] - x2 * s1[None, :], x2 * c2[None, :] + x1 * s2[None, :]
        out = OUT + b * o_b + s * o_s + h[:, None] * o_h + i[None, :]
        tl.store(out, y1.to(OUT.dtype.element_ty), mask=mask)
        tl.store(out + HALF, y2.to(OUT.dtype.element_ty), mask=mask)
        if REST > 0:
            r = tl.arange(0, REST_PADDED)
            kept = (h < heads)[:, None] & (r < REST)[None, :]
            x = X + b * x_b + s * x_s + h[:, None] * x_h + r[None, :] + 2 * HALF
            out = OUT + b * o_b + s * o_s + h[:, None] * o_h + r[None, :] + 2 * HALF
            tl.store(out, tl.load(x, mask=kept, other=0.0), mask=kept)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    rows, heads, width, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    # As the projections leave it: places first, then heads.
    out = torch.empty(rows, width, heads, size, dtype=x.dtype, device=x.device).transpose(1, 2)
    shared = 0 if len(cos) == 1 else cos.stride(0)
    half, rest = cos.shape[-1] // 2, size - cos.shape[-1]
    rotate[(rows * width,)](
        x, out, cos, sin, heads, width, *x.stride()[:3], *out.stride()[:3], shared, cos.stride(1),
        HALF=half, PADDED=triton.next_power_of_2(half),
        REST=rest, REST_PADDED=triton.next_power_of_2(max(1, rest)), HEADS=_HEADS, BACK=back,
    )  # fmt: skip
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(q, cos, sin, back=False), _turned(k, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(dq, cos, sin, back=True), _turned(dk, cos, sin, back=True), None, None


def fuse_rotary(model: Any) -> int:
    """Replaces the function of a model's code by the kernel; returns in how many files of it."""
    device = model.device

    def instead(own: Any) -> Any:
        if not _agrees(own, device, size=12):
            return None
        return _instead_of(own, parts=_agrees(own, device, size=20))

    return replace_function(model, _NAME, instead)


def _instead_of(own: Any, *, parts: bool) -> Any:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        fits = _fits(q, k, cos, sin) and (parts or q.shape[-1] == cos.shape[-1])
        if rest or named or not fits:
            return own(q, k, cos, sin, *rest, **named)
        return _Rotary.apply(q, k, cos, sin)

    return apply


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    rows = (1, len(q))
    return (
        q.is_cuda and q.ndim == k.ndim == 4 and cos.ndim == sin.ndim == 3
        and cos.shape == sin.shape and cos.stride() == sin.stride() and cos.stride(-1) == 1
        and q.shape[-1] == k.shape[-1] >= cos.shape[-1] and cos.shape[-1] % 2 == 0
        and q.shape[2] == k.shape[2] == cos.shape[1] and len(cos) in rows and len(k) == len(q)
        and q.dtype == k.dtype and not cos.requires_grad
    )  # fmt: skip


@torch.no_grad()
def _agrees(own: Any, device: torch.device, size: int) -> bool:
    """Whether a function turns halves, as the kernel does, the 12 first of heads of this size;
    asked with values that tell."""
    draw = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(2, heads, 3, size, generator=draw, device=device) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 12, generator=draw, device=device) for _ in range(2))
    try:
        said = own(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return False
    fused = _Rotary.apply(q, k, cos, sin)
    return all(
        isinstance(one, Tensor)
        and one.shape == other.shape
        and torch.allclose(one, other, atol=1e-5)
        for one, other in zip(said, fused, strict=True)
    )
