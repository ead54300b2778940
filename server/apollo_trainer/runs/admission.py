"""What a queue refuses before it takes a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from apollo_grpc.errors import ResourceExhausted
from apollo_trainer.config import Settings
from apollo_trainer.runs.run import QueuedRun
from apollo_trainer.training.options import OptimizerOptions, StateShape

MIB = 2**20


def require_room(waiting: Sequence[QueuedRun], size_bytes: int, settings: Settings) -> None:
    """Raises ResourceExhausted with QUEUE_FULL where as many runs or bytes wait as may."""
    limit, limit_mebibytes = settings.max_queued_runs, settings.max_queued_mebibytes
    if len(waiting) >= limit:
        raise ResourceExhausted(
            f"{len(waiting)} runs are waiting, which is the limit; nothing was queued. "
            "Try again when some have ended.",
            reason="QUEUE_FULL",
            metadata={"limit": str(limit)},
        )
    held = sum(run.size_bytes for run in waiting)
    if held and held + size_bytes > limit_mebibytes * MIB:
        raise ResourceExhausted(
            f"The runs that wait have {held} bytes of samples, this one {size_bytes}: together "
            f"more than the limit of {limit_mebibytes} MiB; nothing was queued. Try again when "
            "some have ended.",
            reason="QUEUE_FULL",
            metadata={"limit_mebibytes": str(limit_mebibytes)},
        )


def require_shape(
    shape: StateShape, before: Iterable[QueuedRun], options: OptimizerOptions
) -> None:
    """Raises FailedPrecondition where the run asks for another state than it will find.

    Args:
        shape: of the optimizer's state now.
        before: the runs that have their turns first.
    """
    for run in before:
        if run.options.reset and not run.dry_run:
            shape = run.options.shape_on(shape)
    options.shape_on(shape)
