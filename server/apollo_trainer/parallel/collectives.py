"""Sums over ranks that autograd knows of: what goes into divided layers, and what comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apollo_trainer.parallel.ranks import Ranks


def spread(x: Tensor, ranks: Ranks) -> Tensor:
    """The same on all ranks, for layers of which each has a part; its gradient is their sum."""
    return _Spread.apply(x, ranks)  # type: ignore[no-untyped-call, no-any-return]


def summed(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of what each rank's part of a layer gives; its gradient is the same for all."""
    return _Summed.apply(x, ranks)  # type: ignore[no-untyped-call, no-any-return]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        """As it is."""
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Summed."""
        total = grads[0].clone(memory_format=torch.contiguous_format)
        ctx.ranks.sum(total)
        return total, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        """Summed."""
        total = x.clone(memory_format=torch.contiguous_format)
        ranks.sum(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As it is."""
        return grads[0], None
