"""One operation, from the call that begins it until its end is on disk."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from apollo_grpc import traces
from apollo_grpc.errors import ApolloError, Cancelled, FailedPrecondition, Internal, printable
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import training_pb2
from apollo_trainer import logs
from apollo_trainer.checkpoints.directory import Progress
from apollo_trainer.ledger import OperationChange, OperationRow, Readers
from apollo_trainer.operations.job import Job, stopped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What a call asks for.

    Attributes:
        request: has a `request_id`.
        start: queues the job, which tells its progress; raises Unavailable when the server stops.
            Any thread.
        answer: what the job came to, as an Operation that has nothing but its outcome.
    """

    kind: pb.OperationKind.ValueType
    request: Any
    start: Callable[[Progress], Job[Any]]
    answer: Callable[[Any], pb.Operation]

    @property
    def digest(self) -> bytes:
        """By which two requests are compared; what is kept of many does not grow with them."""
        content = self.request.SerializeToString(deterministic=True)
        return hashlib.sha256(b"%d " % self.kind + content).digest()


class Keeper(Protocol):
    """Writes operations, and is told of those that have not ended. Any thread calls."""

    def keep(self, change: OperationChange) -> None:
        """Queues a change of a row for writing."""

    def work_changed(self) -> None:
        """One more operation is at work, or one less."""

    def forget(self, operation: Operation) -> None:
        """It has ended, and that is on disk."""


class Operation:
    """An operation as others see it: each of its states once it is on disk.

    One that the ledger refuses is begun all the same, without an id: a full disk must not keep
    anybody from saving what was learned, or from making room.

    Args:
        row: as it is on disk, or is to be.

    Attributes:
        row: as it is shown.
        progress: the last that its job told; any thread reads it.
        begun: ends once it is on disk, or was refused, and its job waits. Nobody can cancel it.
        error: what it ended with, where it did not succeed.
    """

    def __init__(self, row: OperationRow, keeper: Keeper):
        self.row = self._reached = row
        self._keeper, self._readers = keeper, Readers()
        self.progress: pb.Operation.Progress | None = None
        self._job: Job[Any] | None = None
        self._span = traces.Span()
        self.error: Exception | None = None
        self.begun: Future[None] = Future()
        self.begun.set_running_or_notify_cancel()
        if row.ended:
            self.begun.set_result(None)

    @property
    def at_work(self) -> bool:
        """Whether its job has begun and not ended."""
        return bool(self._reached.started) and not self._reached.ended

    @property
    def failed(self) -> bool:
        """Whether it has ended without success, so that the same call begins it anew."""
        return bool(self.row.ended) and self.row.state != pb.OPERATION_STATE_SUCCEEDED

    def message(self) -> pb.Operation:
        """As it is shown now. Any thread."""
        operation = self.row.to_operation()
        if self.progress and operation.state == pb.OPERATION_STATE_RUNNING:
            operation.progress.CopyFrom(self.progress)
        return operation

    # --- its job's side, on any thread ------------------------------------------------------

    def begin(self, asked: Asked) -> None:
        """Has it written, then its job queued."""
        name = pb.OperationKind.Name(asked.kind).removeprefix("OPERATION_KIND_")
        self._span = traces.begin(name.lower())
        self._keeper.keep(OperationChange(self.row, partial(self._accepted, asked)))

    def _accepted(self, asked: Asked, refused: ApolloError | None) -> None:
        if refused:
            log.warning("an operation is begun that is not kept: %s", refused.message)
            self.row = self._reached = replace(self.row, operation_id="")
        try:
            # What it queues is of this operation.
            with logs.about(operation_id=self.row.operation_id), self._span.current():
                self._job = asked.start(self._tell)
        except Exception as error:
            self._job = Job(self._tell)
            self._job.set_exception(error)
        self._job.when_begun(lambda: self._reach(pb.OPERATION_STATE_RUNNING, started=_now()))
        # Without the request, which may be large.
        self._job.add_done_callback(partial(self._ended, asked.answer))
        self.begun.set_result(None)

    def _tell(self, done: int, total: int, current: str) -> None:
        self.progress = pb.Operation.Progress(
            bytes_done=done, bytes_total=total, current=printable(current)
        )
        self._readers.wake()

    def _ended(self, answer: Callable[[Any], pb.Operation], job: Future[Any]) -> None:
        try:
            outcome, state = answer(job.result()), pb.OPERATION_STATE_SUCCEEDED
        except Exception as raised:
            self.error = error = _as_told(raised, self.row.operation_id)
            failure = training_pb2.Notice(reason=error.reason, message=printable(error.message))
            outcome, state = pb.Operation(failure=failure), pb.OPERATION_STATE_FAILED
            if isinstance(error, Cancelled):
                state = pb.OPERATION_STATE_CANCELLED
        failed = state != pb.OPERATION_STATE_SUCCEEDED
        self._span.end(failed=failed, operation_id=self.row.operation_id)
        self._reach(state, ended=_now(), outcome=outcome.SerializeToString())

    def _reach(self, state: pb.OperationState.ValueType, **changes: Any) -> None:
        row = self._reached = replace(self._reached, state=state, **changes)
        self._keeper.work_changed()
        told = partial(self._show, row)
        if row.operation_id:
            self._keeper.keep(OperationChange(row, told, again=True))
        else:
            told(None)

    def _show(self, row: OperationRow, refused: ApolloError | None) -> None:
        # What the disk refuses is told again once it takes it, and was shown by then.
        if not self.row.ended:
            self.row = row
        if row.ended and not refused:
            self._keeper.forget(self)
        self._readers.wake()

    # --- its callers' side, on the event loop -----------------------------------------------

    def cancel(self) -> tuple[bool, bool]:
        """Asks it to stop; returns whether it will or did, and whether its job has ended."""
        if self._job is None:
            return self.row.state == pb.OPERATION_STATE_CANCELLED, True
        return self._job.cancel(), self._job.done()

    async def follow(self, interval: float = 0.0) -> AsyncIterator[pb.Operation]:
        """Yields it as it is, then as it changes, until it has ended.

        Args:
            interval: seconds between two that differ by their progress alone.
        """
        told: pb.Operation | None = None
        with self._readers.joined() as changed:
            while told is None or not told.HasField("end_time"):
                changed.clear()
                if (seen := self.message()) != told:
                    told = seen
                    yield seen
                    continue
                await changed.wait()
                if interval and self.row.state == told.state:
                    await asyncio.sleep(interval)


def refused_by_disk(error: OSError) -> FailedPrecondition:
    """The error of a job, or of a look, that the disk refused."""
    return FailedPrecondition(
        f"The disk refused ({error.strerror}). No weights are lost: the next sync, or start of "
        "the server, leaves the model directory wholly as before or wholly new. Make room or "
        "mend the permissions of the directory and its parent, then try again; `apollo checkpoint "
        "export FOLDER` writes what was learned to another disk.",
        reason="DIRECTORY_NOT_WRITABLE",
    )


def _as_told(error: Exception, operation_id: str) -> ApolloError:
    if isinstance(error, CancelledError):
        return stopped()
    if isinstance(error, OSError):
        return refused_by_disk(error)
    if isinstance(error, ApolloError):
        return error
    about = {"operation_id": operation_id}
    log.error("unexpected error, operation %s", operation_id, exc_info=error, extra=about)
    return Internal(
        f"The server made a mistake; its log has the details under operation {operation_id}."
    )


def _now() -> int:
    return time.time_ns()
