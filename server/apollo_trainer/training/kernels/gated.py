"""Gated MLPs whose product silu(gate) * up is one kernel each way, which are two and four.

Which modules are such MLPs is found by trying them, as with norms.
"""

# Triton reads the source of its functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_PARTS = ("gate_proj", "up_proj", "down_proj")
_BLOCK = 2048
_ROUNDING = 2.0**-6


@triton.jit
def gate_forward(GATE, UP, OUT, count, BLOCK: tl.constexpr):
    """silu(gate) * up, of so many elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + i, mask=i < count, other=0.0).to(tl.float32)
    up = tl.load(UP + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(OUT + i, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=i < count)


@triton.jit
def gate_backward(GATE, UP, DY, OF_GATE, OF_UP, count, BLOCK: tl.constexpr):
    """The gradients of both."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + i, mask=i < count, other=0.0).to(tl.float32)
    up = tl.load(UP + i, mask=i < count, other=0.0).to(tl.float32)
    dy = tl.load(DY + i, mask=i < count, other=0.0).to(tl.float32)
    part = tl.sigmoid(gate)
    of_gate = dy * up * part * (1.0 + gate * (1.0 - part))
    tl.store(OF_GATE + i, of_gate.to(OF_GATE.dtype.element_ty), mask=i < count)
    tl.store(OF_UP + i, (dy * gate * part).to(OF_UP.dtype.element_ty), mask=i < count)


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    result: Tensor = _Gated.apply(gate, up)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        gate_forward[(triton.cdiv(out.numel(), _BLOCK),)](gate, up, out, out.numel(), BLOCK=_BLOCK)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate, up), dy = ctx.saved_tensors, grads[0].contiguous()
        of_gate, of_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        grid = (triton.cdiv(count, _BLOCK),)
        gate_backward[grid](gate, up, dy, of_gate, of_up, count, BLOCK=_BLOCK)
        return of_gate, of_up


@torch.no_grad()
def fuse_gated(model: Any) -> int:
    """Lets a model's gated MLPs use the kernel; returns how many there are."""
    found = [module for module in model.modules() if _is_gated(module)]
    for module in found:
        module.forward = partial(_instead_of, module, module.forward)
    return len(found)


def _instead_of(module: Any, own: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
    return own(x, *rest, **named) if rest or named else _fused(module, x)


def _fused(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(gated_product(module.gate_proj(x), module.up_proj(x)))


def _is_gated(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in _PARTS]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return False
    weight = parts[0].weight
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=draw).to(weight)
    try:
        said = module(x)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return False
    fused = _fused(module, x)
    if not isinstance(said, Tensor) or said.shape != fused.shape or said.dtype != fused.dtype:
        return False
    return bool((said - fused).abs().max() <= _ROUNDING * fused.abs().max())
