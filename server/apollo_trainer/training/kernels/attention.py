"""Attention of a continuation to a frozen context and to itself, as two kernels each way.

The queries are few and the keys many. FlashAttention's kernels then leave most of a GPU idle, make
gradients of the context's keys that nobody asks for, and want both parts' keys copied next to each
other. Here the heads of a group are rows of one tile, the context is cut into parts that run side
by side, and each part of the keys stays where it is.
"""

# Triton reads the source of its functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_trainer.training.apart import Frozen, NotApart, Rule
from apollo_trainer.training.kernels.attend import (
    attend_back_keys,
    attend_back_queries,
    attend_forward,
    attend_join,
)

_LARGEST_HEAD = 256
_SHORTEST_PART = 256  # keys
_PROGRAMS = 96  # from so many on, cutting contexts costs an H200 more than it gives
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def attend(
    query: Tensor, key: Tensor, value: Tensor, frozen: Frozen | None, rule: Rule,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each query attends to its context, and to the keys up to its own.

    Args:
        query: [samples, heads, T, size].
        key: [samples, key heads, T, size], as `value`; heads of queries share them by groups.
        frozen: before the first key; None where nothing is.
        sinks: [heads], scores of a key without a value; None where there is none.

    Returns [samples, T, heads, size]. Raises NotApart where the heads are of no size that the
    kernels take.
    """
    sizes = {t.shape[-1] for t in (query, key, value)}
    if len(sizes) > 1 or max(sizes) > _LARGEST_HEAD:
        raise NotApart("heads are too large, or of two sizes")
    parts = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)]
    result: Tensor = _Attention.apply(*parts, sinks, frozen, rule)
    return result


class _Shape:
    """Sizes of one call, and what its kernels are compiled for."""

    def __init__(self, query: Tensor, key: Tensor, frozen: Frozen | None, rule: Rule):
        self.samples, self.heads, self.width, size = query.shape
        self.key_heads, self.rule, self.frozen = key.shape[1], rule, frozen
        single = query.dtype == torch.float32
        self.rows = 32 if single else 64
        self.common = {
            "TYPE": _TYPES[query.dtype],
            "GROUP": self.heads // self.key_heads,
            "SIZE": size,
            "PADDED": max(16, triton.next_power_of_2(size)),
            "CAPPED": rule.cap > 0,
            "WINDOWED": rule.window > 0,
            "BLOCK_N": 32 if single else 64,
        }
        self.blocks = triton.cdiv(self.width * self.common["GROUP"], self.rows)
        self.splits = 1
        if frozen is not None:
            width = frozen.keys.shape[2]
            wanted = triton.cdiv(_PROGRAMS, self.blocks * self.samples * self.key_heads)
            self.splits = max(1, min(wanted, width // _SHORTEST_PART))

    @property
    def numbers(self) -> tuple[float, ...]:
        """What every kernel is told."""
        rule = self.rule
        return self.width, self.key_heads, rule.scale, rule.window, rule.cap

    def context(self, query: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Tensors and strides of the context; any will do where there is none."""
        if self.frozen is None:
            return (query,) * 4, (0,) * 6
        f = self.frozen
        return (f.keys, f.values, f.rows, f.lengths), (*f.keys.stride()[:3], *f.values.stride()[:3])

    def stages(self, most: int) -> dict[str, int]:
        """Of a kernel's loads; wide heads leave room for two."""
        return {"num_warps": 4, "num_stages": most if self.common["PADDED"] <= 128 else 2}


class _Attention(torch.autograd.Function):
    """See `attend`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, frozen: Frozen | None,
        rule: Rule,
    ) -> Tensor:  # fmt: skip
        shape = _Shape(q, k, frozen, rule)
        size, n = q.shape[-1], shape.splits
        sizes = (shape.samples, shape.width, shape.heads, size)
        out, sums = q.new_empty(sizes), _floats(q, shape)
        parts = out if n == 1 else q.new_empty(n, *sizes)
        of_parts = sums if n == 1 else torch.empty((n, *sums.shape), device=q.device)
        tensors, strides = shape.context(q)
        grid = (shape.blocks, n, shape.samples * shape.key_heads)
        attend_forward[grid](
            q, k, v, *tensors, q if sinks is None else sinks, parts, of_parts, *shape.numbers,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, **shape.common,
            FROZEN=frozen is not None, SINKING=sinks is not None, BLOCK_M=shape.rows,
            **shape.stages(3),
        )  # fmt: skip
        if n > 1:
            common = {name: shape.common[name] for name in ("GROUP", "SIZE", "PADDED")}
            blocks = triton.cdiv(shape.width * common["GROUP"], 16)
            attend_join[(blocks, grid[2])](
                parts, of_parts, out, sums, *shape.numbers[:2], n, **common, BLOCK_M=16
            )
        ctx.save_for_backward(q, k, v, out, sums, sinks)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, sinks = ctx.saved_tensors
        shape, do = ctx.shape, grads[0].contiguous()
        size, n, delta = q.shape[-1], shape.splits, torch.empty_like(sums)
        dq = torch.empty(
            (n, *out.shape), dtype=q.dtype if n == 1 else torch.float32, device=q.device
        )
        tensors, strides = shape.context(q)
        own = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        pairs = shape.samples * shape.key_heads
        attend_back_queries[(shape.blocks, n, pairs)](
            q, k, v, *tensors, out, do, sums, delta, dq, *shape.numbers, *own, *strides,
            **shape.common, FROZEN=shape.frozen is not None, BLOCK_M=shape.rows,
            **shape.stages(3),
        )  # fmt: skip
        dk, dv = (q.new_empty(shape.samples, shape.width, shape.key_heads, size) for _ in range(2))
        rows = shape.rows if size <= 128 else 32
        attend_back_keys[(triton.cdiv(shape.width, shape.common["BLOCK_N"]), pairs)](
            q, k, v, do, sums, delta, dk, dv, *shape.numbers, *own, **shape.common, BLOCK_M=rows,
            **shape.stages(2),
        )  # fmt: skip
        of_sinks = None if sinks is None else _of_sinks(sinks, sums, delta, shape)
        dq = dq[0] if n == 1 else dq.sum(0)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), of_sinks, None, None


def _floats(q: Tensor, shape: _Shape) -> Tensor:
    """A number a row: [samples, key heads, T group]."""
    rows = shape.width * shape.heads // shape.key_heads
    return torch.empty((shape.samples, shape.key_heads, rows), device=q.device)


def _of_sinks(sinks: Tensor, sums: Tensor, delta: Tensor, shape: _Shape) -> Tensor:
    """The gradient of the sinks [heads]: a sink's part of a row's softmax has no value."""
    group = shape.heads // shape.key_heads
    rows = (shape.samples, shape.key_heads, shape.width, group)
    scores = sinks.float().view(shape.key_heads, 1, group) * 1.4426950408889634
    part = torch.exp2(scores - sums.view(rows))
    return -(part * delta.view(rows)).sum((0, 2)).view(-1).to(sinks.dtype)
