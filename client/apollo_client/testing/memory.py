"""What a fake server keeps, also over its restarts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from apollo_client.testing.script import Script
from apollo_grpc.errors import Aborted, NotFound, Resource
from apollo_grpc.times import now
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import dataset_pb2, status_pb2
from apollo_grpc.v1 import training_pb2 as pb

ENDED = (
    pb.RUN_STATE_SUCCEEDED,
    pb.RUN_STATE_FAILED,
    pb.RUN_STATE_CANCELLED,
    pb.RUN_STATE_REJECTED,
)
DIRECTORY = "/models/fake"
WEIGHT_BYTES = 4096


@dataclass
class KeptRun:
    """One run: the API's message with the whole spec, its samples, and its events."""

    number: int
    run: pb.Run
    samples: list[pb.Sample]
    events: list[pb.RunEvent] = field(default_factory=list)
    cancelled: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether `finished` was told."""
        return self.run.state in ENDED


@dataclass
class KeptOperation:
    """One operation on checkpoints.

    Attributes:
        request: that began it, by which two are compared.
        work: what it does; returns its outcome.
        error: by which its stream ends.
    """

    number: int
    message: cp.Operation
    request: Any
    work: Callable[[], Any]
    error: Any = None
    cancelled: bool = False


@dataclass
class KeptSnapshot:
    """One snapshot."""

    number: int
    message: cp.Snapshot


@dataclass
class KeptDataset:
    """One dataset, with its samples."""

    number: int
    message: dataset_pb2.Dataset
    samples: list[pb.Sample]


class Memory:
    """All of it, behind one lock.

    Attributes:
        changed: held over every read and write; notified after each write.
        jobs: runs and operations that wait, in the order of their turns.
        undoable: the optimizer's step before each update that can be taken back.
        log: events of all runs, by revision.
    """

    def __init__(self, script: Script, max_queued_runs: int):
        self.script, self.max_queued_runs = script, max_queued_runs
        self.changed = threading.Condition()
        self.runs: dict[str, KeptRun] = {}
        self.operations: dict[str, KeptOperation] = {}
        self.snapshots: dict[str, KeptSnapshot] = {}
        self.datasets: dict[str, KeptDataset] = {}
        self.probes: dict[str, pb.Probe] = {}
        self.jobs: list[KeptRun | KeptOperation] = []
        self.active: KeptRun | KeptOperation | None = None
        self.log: list[tuple[int, pb.RunEvent]] = []
        self.directories: set[str] = set()
        self.last_sync = status_pb2.LastSync()
        self.weight_version = self.optimizer_step = self.revision = self._numbers = 0
        self.undoable: list[int] = []
        self.generation = 0

    def number(self) -> int:
        """One that rises with each call."""
        with self.changed:
            self._numbers += 1
            return self._numbers

    def wake(self) -> None:
        """Has everybody who waits look again."""
        with self.changed:
            self.changed.notify_all()

    def wait(self, done: Callable[[], Any], context: Any) -> bool:
        """Waits, with the lock held, until it is done; False where the caller has left."""
        self.changed.wait_for(lambda: done() or not context.is_active())
        return bool(context.is_active())

    def require_version(self, request: Any, *, may_rise: bool = False) -> None:
        """Raises Aborted where the weights have another version than a request expects."""
        expected, live = request.expected_weight_version, self.weight_version
        if not request.HasField("expected_weight_version") or live == expected:
            return
        if live > expected or not may_rise:
            raise Aborted(
                f"The weights have version {live}, not {expected}; nothing was done.",
                reason="WEIGHT_VERSION_CHANGED",
            )

    def run(self, run_id: str) -> KeptRun:
        """Raises NotFound."""
        if run_id not in self.runs:
            raise not_found("run", run_id)
        return self.runs[run_id]

    def append(self, kept: KeptRun, **event: Any) -> None:
        """One more event of a run, which its readers get."""
        with self.changed:
            run, sequence = kept.run, len(kept.events) + 1
            told = pb.RunEvent(run_id=run.run_id, sequence=sequence, event_time=now(), **event)
            kept.events.append(told)
            run.last_sequence = sequence
            self._show(run, told)
            self.revision += 1
            self.log.append((self.revision, told))
            self.changed.notify_all()

    def _show(self, run: pb.Run, told: pb.RunEvent) -> None:
        if told.HasField("started"):
            run.state = pb.RUN_STATE_RUNNING
            run.start_time.CopyFrom(told.event_time)
        elif told.HasField("step"):
            run.last_loss = told.step.loss
            run.steps_done = 0 if told.step.dry_run else told.step.step
        elif told.HasField("finished"):
            run.state, run.steps_done = told.finished.state, told.finished.steps_done
            run.end_time.CopyFrom(told.event_time)
            if told.finished.HasField("failure"):
                run.failure.CopyFrom(told.finished.failure)
            if told.finished.weight_version:
                run.weight_version = told.finished.weight_version

    def update(self) -> None:
        """Counts an update of the weights."""
        with self.changed:
            self.undoable.append(self.optimizer_step)
            self.optimizer_step += 1
            self.weight_version += 1

    def take_back(self, updates: int) -> None:
        """Takes the last updates back, which counts as one more."""
        with self.changed:
            if updates:
                step = self.undoable[-updates]
                del self.undoable[-updates:]
                self.set_back(step)

    def set_back(self, optimizer_step: int) -> None:
        """The optimizer as it was at a step; the version of the weights goes up all the same."""
        with self.changed:
            self.optimizer_step = optimizer_step
            self.weight_version += 1


def not_found(kind: str, name: str) -> NotFound:
    """The error for what is not kept: a run, an operation, a snapshot or a dataset."""
    return NotFound(
        f"There is no {kind} {name!r}; nothing was done.",
        reason=f"{kind.upper()}_NOT_FOUND",
        resource=Resource(kind, name),
    )
