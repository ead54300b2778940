"""Compiles what steps need before any is taken, by steps of parameters that are thrown away."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from apollo_trainer.optim import cpu
from apollo_trainer.optim.apollo import Apollo
from apollo_trainer.optim.factored import Factored, Gradient
from apollo_trainer.optim.options import Variant
from apollo_trainer.optim.rounding import RoundingMode


def compile_ahead(optimizer: Apollo) -> None:
    """Compiles for an optimizer's parameters, some seconds at the first call in a process.

    On any thread, also while another steps: none of its own parameters is stepped. What is on disk
    from an earlier process is not compiled again for a GPU.
    """
    for path, device, dtype, rank in optimizer.compiled_kinds():
        if path == "cpu":
            compile_loops(dtype, optimizer.variant, optimizer.rounding)
        elif rank is not None:
            compile_kernels(device, dtype, rank, optimizer.variant, optimizer.rounding)


@lru_cache
def compile_loops(dtype: torch.dtype, variant: Variant, rounding: RoundingMode) -> None:
    """What any order of calls compiles is the same; a second thread waits for numba's own lock."""
    for rank in (2, None):
        optimizer = Apollo(
            cpu.throwaway([dtype]), rank=rank, variant=variant, rounding=rounding, impl="fused"
        )
        # Of factors, and of several passes, a gradient comes in float32.
        wide = {
            p: p.grad.float()
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        for optimizer.measure in (False, True):
            optimizer.step()
            optimizer.step(gradients=wide)


@lru_cache
def compile_kernels(
    device: torch.device, dtype: torch.dtype, rank: int, variant: Variant, rounding: RoundingMode
) -> None:
    """The kernels for aligned matrices whose gradients are factors, and for vectors."""
    side = 128 * -(-rank // 128)
    shapes = {"tall": (2 * side, side), "wide": (side, 2 * side), "vector": (side,)}
    params = {n: torch.zeros(s, dtype=dtype, device=device) for n, s in shapes.items()}
    optimizer = Apollo(params.items(), rank=rank, variant=variant, rounding=rounding, impl="fused")
    optimizer.measure = True
    gradients: dict[Tensor, Gradient] = {
        p: torch.zeros_like(p)
        if p.ndim == 1
        else Factored(*(torch.zeros(32, n, dtype=dtype, device=device) for n in p.shape))
        for p in params.values()
    }
    optimizer.prepare(gradients)
    optimizer.step(gradients=gradients)
