"""Causal convolutions of single channels, and SiLU after them, as one kernel; two on the way back.

The layers of linear attention and of Mamba begin with one. torch's reads channels first, so that
transformers turns what a projection leaves, and turns it back: four passes over memory for one.
What a model's own function says is compared first; one that computes otherwise is left as it is.
"""

# Triton reads the source of its functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_trainer.training.functions import replace_function

_NAME = "causal_conv1d_fn"
_SILU = ("silu", "swish")
_WIDEST = 8  # places that one place sees
_TILE = {"TOKENS": 32, "CHANNELS": 64}
# What transformers' code for every device knows nothing of: where texts begin in one row.
_TEXTS = ("seq_idx", "cu_seq_lens_q")


@triton.jit
def convolved(X, W, BIAS, b, t, c, width, channels, x_b, x_c, x_t,
              TAPS: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Sums [tokens, channels] of each place and those before it, before SiLU."""
    total = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    inside = c < channels
    for tap in tl.static_range(TAPS):
        at = t - (TAPS - 1) + tap
        seen = ((at >= 0) & (at < width))[:, None] & inside[None, :]
        x = tl.load(X + b * x_b + at[:, None] * x_t + c[None, :] * x_c, mask=seen, other=0.0)
        w = tl.load(W + c * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        total += x.to(tl.float32) * w[None, :]
    if HAS_BIAS:
        total += tl.load(BIAS + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def conv_forward(X, W, BIAS, OUT, width, channels, x_b, x_c, x_t,
                 TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
                 TOKENS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """OUT [rows, width, channels], without gaps."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    out = convolved(X, W, BIAS, b, t, c, width, channels, x_b, x_c, x_t, TAPS, HAS_BIAS)
    if SILU:
        out = out * tl.sigmoid(out)
    at = (b * width + t[:, None]) * channels + c[None, :]
    mask = (t < width)[:, None] & (c < channels)[None, :]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def conv_sums(X, W, BIAS, DY, DZ, PARTS, width, channels, x_b, x_c, x_t, y_b, y_c, y_t,
              TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
              TOKENS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """DZ, the sums' gradient: float32 [rows, width, channels]; and of each tile the weight's and
    the bias's: PARTS float32 [tiles, TAPS + 1, channels]."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    mask = (t < width)[:, None] & inside[None, :]
    dy = DY + b * y_b + t[:, None] * y_t + c[None, :] * y_c
    dz = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = convolved(X, W, BIAS, b, t, c, width, channels, x_b, x_c, x_t, TAPS, HAS_BIAS)
        part = tl.sigmoid(z)
        dz = dz * part * (1.0 + z * (1.0 - part))
    tl.store(DZ + (b * width + t[:, None]) * channels + c[None, :], dz, mask=mask)
    tile = b * tl.num_programs(0) + tl.program_id(0)
    sums = PARTS + tile * (TAPS + 1) * channels + c
    for tap in tl.static_range(TAPS):
        at = t - (TAPS - 1) + tap
        seen = ((at >= 0) & (at < width))[:, None] & inside[None, :]
        x = tl.load(X + b * x_b + at[:, None] * x_t + c[None, :] * x_c, mask=seen, other=0.0)
        tl.store(sums + tap * channels, tl.sum(dz * x.to(tl.float32), 0), mask=inside)
    tl.store(sums + TAPS * channels, tl.sum(dz, 0), mask=inside)


@triton.jit
def conv_backward(DZ, W, DX, width, channels, TAPS: tl.constexpr,
                  TOKENS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """DX [rows, width, channels], without gaps: of each place from the sums that it is in."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    dx = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for tap in tl.static_range(TAPS):
        at = t + (TAPS - 1) - tap
        seen = (at < width)[:, None] & inside[None, :]
        dz = tl.load(DZ + (b * width + at[:, None]) * channels + c[None, :], mask=seen, other=0.0)
        w = tl.load(W + c * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        dx += dz * w[None, :]
    at = (b * width + t[:, None]) * channels + c[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=(t < width)[:, None] & inside[None, :])


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
    """What of x [B, C, T] each place sees of itself and those before it: [B, C, T], of x's dtype.

    Args:
        weight: [C, taps], the last tap that of the place itself; of x's dtype.
        bias: [C], or none.
    """
    result: Tensor = _Conv.apply(x, weight, bias, silu)
    return result


def _grid(rows: int, channels: int, width: int) -> tuple[int, int, int]:
    return triton.cdiv(width, _TILE["TOKENS"]), triton.cdiv(channels, _TILE["CHANNELS"]), rows


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As x [B, C, T], channels next to each other: as projections leave and take it."""
    rows, channels, width = x.shape
    return torch.empty(rows, width, channels, dtype=dtype, device=x.device).transpose(1, 2)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        (rows, channels, width), weight = x.shape, weight.contiguous()
        out = _empty(x, x.dtype)
        how = {"TAPS": weight.shape[1], "HAS_BIAS": bias is not None, "SILU": silu, **_TILE}
        conv_forward[_grid(rows, channels, width)](
            x, weight, bias, out, width, channels, *x.stride(), **how
        )
        ctx.save_for_backward(x, weight, bias)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, bias), (dy,), how = ctx.saved_tensors, grads, ctx.how
        (rows, channels, width), taps = x.shape, how["TAPS"]
        grid = _grid(rows, channels, width)
        dz, dx = _empty(x, torch.float32), _empty(x, x.dtype)
        parts = torch.empty(rows * grid[0], taps + 1, channels, device=x.device)
        conv_sums[grid](
            x, weight, bias, dy, dz, parts, width, channels, *x.stride(), *dy.stride(), **how
        )
        conv_backward[grid](dz, weight, dx, width, channels, TAPS=taps, **_TILE)
        sums = parts.sum(0)
        of_weight = sums[:taps].T.to(weight.dtype)
        return dx, of_weight, None if bias is None else sums[taps].to(bias.dtype), None


def fuse_conv(model: Any) -> int:
    """Replaces the function of a model's code by the kernel; returns in how many files of it."""
    device = model.device
    return replace_function(
        model, _NAME, lambda own: _instead_of(own) if _agrees(own, device) else None
    )


def _instead_of(own: Any) -> Any:
    @functools.wraps(own)
    def apply(
        hidden_states: Tensor, weight: Tensor, bias: Any = None, activation: Any = None, **more: Any
    ) -> Any:
        cut = any(more.get(name) is not None for name in _TEXTS)
        if cut or not _fits(hidden_states, weight, bias, activation):
            return own(hidden_states, weight, bias, activation=activation, **more)
        return causal_conv(hidden_states, weight, bias, silu=activation is not None)

    return apply


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Any) -> bool:
    return (
        x.is_cuda and x.ndim == 3 and weight.ndim == 2 and weight.shape[0] == x.shape[1]
        and weight.shape[1] <= _WIDEST and x.dtype == weight.dtype and x.numel() > 0
        and (bias is None or bias.dtype == x.dtype)
        and (activation is None or activation in _SILU)
    )  # fmt: skip


@torch.no_grad()
def _agrees(own: Any, device: torch.device) -> bool:
    """Whether a function convolves as the kernel does; asked with values that tell."""
    draw = torch.Generator(device).manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=draw, device=device) for shape in ((2, 12, 40), (12, 4), (12,))
    )
    for given, activation in ((None, "silu"), (bias, "silu"), (bias, None)):
        try:
            said = own(x, weight, given, activation=activation)
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
            return False
        fused = causal_conv(x, weight, given, silu=activation is not None)
        # torch's convolutions may round to 11 bits.
        if said.shape != fused.shape or not torch.allclose(said, fused, atol=1e-2):
            return False
    return True
