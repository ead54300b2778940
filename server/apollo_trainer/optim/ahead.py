"""Compiles what steps need before any is taken, by stepping throwaway parameters."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from apollo_trainer.optim import cpu
from apollo_trainer.optim.apollo import Apollo
from apollo_trainer.optim.factored import Factored, Gradient
from apollo_trainer.optim.options import Variant
from apollo_trainer.optim.rounding import RoundingMode

_OfGradient = Callable[[Tensor], Gradient]


def compile_ahead(optimizer: Apollo) -> None:
    """Compiles for an optimizer's parameters, some seconds at the first call in a process.

    On any thread, also while another steps: the optimizer's own parameters are not touched. For a
    GPU, kernels that an earlier process left on disk are not compiled again.
    """
    for path, device, dtype, rank in optimizer.compiled_kinds():
        if path == "cpu":
            compile_loops(dtype, optimizer.variant, optimizer.rounding)
        elif rank is not None:
            compile_kernels(device, dtype, rank, optimizer.variant, optimizer.rounding)


@lru_cache
def compile_loops(dtype: torch.dtype, variant: Variant, rounding: RoundingMode) -> None:
    """Compiles the loops of a CPU. A second thread waits for numba's lock."""
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
    """The kernels for aligned matrices and for vectors; several at once, on threads of their own.

    Gradients come as factors, as they are made, and in float32 where they are sums.
    """
    side = 128 * -(-rank // 128)
    shapes = ((2 * side, side), (side, 2 * side), (side,))
    kinds: list[_OfGradient] = [_factors, torch.zeros_like, _wide]

    def compile_one(shape: tuple[int, ...], of_gradient: _OfGradient) -> None:
        with torch.cuda.device(device):
            param = torch.zeros(shape, dtype=dtype, device=device)
            optimizer = Apollo(
                [("one", param)], rank=rank, variant=variant, rounding=rounding, impl="fused"
            )
            optimizer.measure = True
            gradients = {param: of_gradient(param)}
            optimizer.prepare(gradients)
            optimizer.step(gradients=gradients)

    jobs = [(s, kind) for s in shapes for kind in kinds if len(s) == 2 or kind is not _factors]
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, *zip(*jobs, strict=True)))


def _factors(param: Tensor) -> Factored:
    sides = (torch.zeros(32, n, dtype=param.dtype, device=param.device) for n in param.shape)
    return Factored(*sides)


def _wide(param: Tensor) -> Tensor:
    return torch.zeros_like(param, dtype=torch.float32)
