"""One step of parameters on a CPU: what reference.py does, in compiled loops over its threads.

Whether a gradient is finite is known here before anything is written, so that nothing is masked.
Where work is cut is decided by the shape alone: neither the number of threads nor what else is
stepped changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from apollo_trainer.optim.cpu.elements import step_elements
from apollo_trainer.optim.cpu.matrices import step_matrices
from apollo_trainer.optim.cpu.memory import BITS
from apollo_trainer.optim.cpu.threads import run
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.parameters import Slot
from apollo_trainer.optim.reference import Job

# Weights of an optimizer below which plain torch is as good: the loops take seconds to compile.
FEW_WEIGHTS = 2**20


def fits(slot: Slot, grad: Gradient) -> bool:
    """Whether the loops take this parameter; the reference path takes all others."""
    p = slot.param
    on_cpu = p.device.type == "cpu" and grad.device.type == "cpu"
    on_cpu = on_cpu and slot.region.whole
    return on_cpu and p.dtype in BITS and grad.dtype in BITS and _loops() is not None


def throwaway(dtypes: Iterable[torch.dtype]) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters with gradients whose step compiles every loop that one of these dtypes needs.

    A vector, a matrix, its transpose, a stack of matrices and a matrix without neighbours.
    """
    shaped: list[tuple[str, torch.nn.Parameter]] = []
    for dtype in dtypes:
        vector, matrix, transposed, stack, apart = torch.zeros(5, 2, 8, 8, dtype=dtype)
        for view in (vector[0, 0], matrix[0], transposed[0].T, stack, apart[0, ::2, ::2]):
            parameter = torch.nn.Parameter(view)
            parameter.grad = torch.zeros_like(view)
            shaped.append((f"{dtype} {len(shaped)}", parameter))
    return shaped


@lru_cache(maxsize=1)
def _loops() -> ModuleType | None:
    """The loops; None without numba, which is imported when the first parameter is stepped."""
    try:
        from apollo_trainer.optim.cpu import loops
    except ImportError:
        return None
    return loops


def step_parameters(jobs: Sequence[Job]) -> list[Tensor]:
    """Steps parameters that `fit`, in place; no thread waits for another's parameter.

    Returns a bool (0-dim) for each: its gradient was not finite. The contract for each is that of
    reference.step_parameter.
    """
    loops = _loops()
    if loops is None:
        raise RuntimeError("The compiled path needs numba; nothing was changed.")
    outcomes = run(
        [
            step_elements(job, loops) if job.slot.rank is None else step_matrices(job, loops)
            for job in jobs
        ]
    )
    for job, (_, found) in zip(jobs, outcomes, strict=True):
        if job.change is not None and found:
            squares, changed = (
                torch.tensor(part, dtype=torch.float64) for part in zip(*found, strict=True)
            )
            job.change.add_sums(squares.sum(), changed.sum())
    return [torch.tensor(not finite) for finite, _ in outcomes]
