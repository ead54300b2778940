"""What a queue refuses: before it takes a run, and at its turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from apollo_grpc.errors import AlreadyExists, Quota, Resource, ResourceExhausted
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.config import Settings
from apollo_trainer.engine import version_changed
from apollo_trainer.ledger import RunRow, digest_of
from apollo_trainer.runs.run import QueuedRun
from apollo_trainer.training.options import OptimizerOptions, StateShape

MIB = 2**20


def begun(found: QueuedRun | RunRow, spec: pb.RunSpec) -> Future[str]:
    """Returns the future of the run that a request began; raises AlreadyExists for another spec."""
    run_id = found.log.run_id if isinstance(found, QueuedRun) else found.run_id
    if found.digest != digest_of(spec):
        raise AlreadyExists(
            "This request_id began a run of another spec; nothing was done. Send a new "
            "request_id, or none.",
            reason="REQUEST_ID_TAKEN",
            metadata={"run_id": run_id},
            resource=Resource("run", run_id),
        )
    return found.durable if isinstance(found, QueuedRun) else known(run_id)


def known(run_id: str) -> Future[str]:
    """Returns the future of a run that is on disk."""
    future: Future[str] = Future()
    future.set_running_or_notify_cancel()
    future.set_result(run_id)
    return future


def require_room(waiting: Sequence[QueuedRun], size_bytes: int, settings: Settings) -> None:
    """Raises ResourceExhausted with QUEUE_FULL where as many runs or bytes wait as may."""
    limit, limit_mebibytes = settings.max_queued_runs, settings.max_queued_mebibytes
    if len(waiting) >= limit:
        raise ResourceExhausted(
            f"{len(waiting)} runs are waiting, which is the limit; nothing was queued. "
            "Try again when some have ended.",
            reason="QUEUE_FULL",
            metadata={"limit": str(limit)},
            quota=Quota("queued_runs", f"at most {limit}"),
        )
    held = sum(run.size_bytes for run in waiting)
    if held and held + size_bytes > limit_mebibytes * MIB:
        raise ResourceExhausted(
            f"The runs that wait have {held} bytes of samples, this one {size_bytes}: together "
            f"more than the limit of {limit_mebibytes} MiB; nothing was queued. Try again when "
            "some have ended.",
            reason="QUEUE_FULL",
            metadata={"limit_mebibytes": str(limit_mebibytes)},
            quota=Quota("queued_bytes", f"at most {limit_mebibytes * MIB}"),
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


def require_version(live: int, spec: pb.RunSpec, *, may_rise: bool = False) -> None:
    """Raises Aborted where the weights do not have the version that a spec expects.

    Args:
        live: the version of the weights.
        may_rise: it is not the run's turn yet: a version below may still become the expected one.
    """
    expected = spec.expected_weight_version
    if not spec.HasField("expected_weight_version") or live == expected:
        return
    if live > expected or not may_rise:
        raise version_changed(live, expected)
