"""Steps of parameters that ranks divide: what they add up, they add up for many at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from apollo_trainer.optim.reference import Job, Steps, begin, step_parameter
from apollo_trainer.parallel.ranks import Ranks

# Elements of moments: few messages, and little memory beside them.
_TOGETHER = 2**24


def step_parameters(jobs: Sequence[Job], ranks: Ranks) -> list[Tensor]:
    """Steps parameters as `step_parameter` does; what ranks divide, they step together.

    Every rank gives the same parameters in the same order.
    """
    skipped, waiting, held = dict[int, Tensor](), dict[int, Steps](), 0
    for n, job in enumerate(jobs):
        if job.slot.cut is None:
            skipped[n] = step_parameter(job)
            continue
        waiting[n], held = begin(job), held + job.state["m"].numel()
        if held >= _TOGETHER:
            skipped |= _finish(waiting, jobs, ranks)
            waiting, held = {}, 0
    skipped |= _finish(waiting, jobs, ranks)
    return [skipped[n] for n in range(len(jobs))]


def _finish(waiting: dict[int, Steps], jobs: Sequence[Job], ranks: Ranks) -> dict[int, Tensor]:
    """Takes steps to their end; all sums that they wait for are made at once."""
    done = dict[int, Tensor]()
    while len(done) < len(waiting):
        sums = list[Tensor]()
        for n, steps in waiting.items():
            try:
                own = next(steps) if n not in done else []
            except StopIteration as end:
                done[n] = end.value
                continue
            for tensor in own if not jobs[n].slot.region.counted else ():
                tensor.zero_()
            sums += own
        ranks.sum(*sums)
    return done
