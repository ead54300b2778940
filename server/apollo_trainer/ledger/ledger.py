"""The ledger: runs, their specs and their events on disk.

Here are the statements that read and write; `LedgerWriter` decides when something is written.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Any

from google.protobuf import timestamp_pb2

from apollo_grpc.errors import DataLoss
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.file import LedgerFile

ENDED = (
    pb.RUN_STATE_SUCCEEDED,
    pb.RUN_STATE_FAILED,
    pb.RUN_STATE_CANCELLED,
    pb.RUN_STATE_REJECTED,
)


@dataclass(frozen=True)
class RunRow:
    """One run as the ledger knows it; times in nanoseconds since 1970, 0 where unset.

    Attributes:
        number: rises with each accepted run.
        digest: `digest_of` the spec.
        spec_head: serialized spec without its samples.
        optimizer_step: of the live optimizer when the run began.
        epoch: of the engine whose weights it changed.
        pruned_through: events up to this sequence were removed.
    """

    number: int
    run_id: str
    request_id: str | None
    digest: bytes
    spec_head: bytes
    state: int
    created: int
    started: int
    ended: int
    steps_done: int
    steps_total: int
    optimizer_step: int
    epoch: str
    last_sequence: int
    pruned_through: int
    failure: bytes | None

    @property
    def has_ended(self) -> bool:
        """Whether no event comes any more."""
        return self.state in ENDED

    def to_run(self, spec: pb.RunSpec | None = None) -> pb.Run:
        """Converts to the API's message, with the given spec or the one without samples."""
        run = pb.Run(
            run_id=self.run_id,
            state=pb.RunState.ValueType(self.state),
            spec=pb.RunSpec.FromString(self.spec_head) if spec is None else spec,
            create_time=_time(self.created),
            steps_done=self.steps_done,
            steps_total=self.steps_total,
            last_sequence=self.last_sequence,
        )
        for stamp, when in ((run.start_time, self.started), (run.end_time, self.ended)):
            if when:
                stamp.CopyFrom(_time(when))
        if self.failure:
            run.failure.ParseFromString(self.failure)
        return run


_COLUMNS = ", ".join(column.name for column in fields(RunRow))


def digest_of(spec: pb.RunSpec) -> bytes:
    """Returns the sha256 by which two specs are compared, also after one was pruned."""
    return hashlib.sha256(_canonical(spec)).digest()


def _canonical(spec: pb.RunSpec) -> bytes:
    return spec.SerializeToString(deterministic=True)


class Ledger:
    """Reads the ledger. Any thread but an event loop's: it may wait for the disk.

    Every method raises DataLoss where the ledger cannot be read.
    """

    def __init__(self, file: LedgerFile):
        self._connection = file.connect()
        self._lock = threading.Lock()

    def run(self, run_id: str) -> RunRow | None:
        """Returns a run by its id."""
        return self._row("WHERE run_id = ?", run_id)

    def run_of_request(self, request_id: str) -> RunRow | None:
        """Returns the run that a request id began."""
        return self._row("WHERE request_id = ?", request_id)

    def latest_on(self, epoch: str) -> RunRow | None:
        """Returns the last run that began on an engine."""
        return self._row("WHERE epoch = ? ORDER BY number DESC LIMIT 1", epoch)

    def unfinished(self) -> list[RunRow]:
        """Returns the runs that have not ended, in the order in which they were accepted."""
        return self._rows(
            "WHERE state IN (?, ?) ORDER BY number", pb.RUN_STATE_QUEUED, pb.RUN_STATE_RUNNING
        )

    def page(self, before: int, states: Sequence[int], size: int) -> list[RunRow]:
        """Returns runs with a smaller number than `before`, newest first."""
        among = f" AND state IN ({', '.join('?' * len(states))})" if states else ""
        where = f"WHERE number < ?{among} ORDER BY number DESC LIMIT ?"
        return self._rows(where, before, *states, size)

    def spec(self, run_id: str) -> pb.RunSpec | None:
        """Returns a run's whole spec; None once it was pruned."""
        found = self._fetch("SELECT spec FROM runs WHERE run_id = ?", run_id)
        return pb.RunSpec.FromString(found[0][0]) if found and found[0][0] is not None else None

    def events(self, run_id: str, after: int, limit: int) -> list[pb.RunEvent]:
        """Returns the next events of a run after a sequence."""
        found = self._fetch(
            "SELECT event FROM events WHERE number = (SELECT number FROM runs WHERE run_id = ?) "
            "AND sequence > ? ORDER BY sequence LIMIT ?",
            run_id,
            after,
            limit,
        )
        return [pb.RunEvent.FromString(event) for (event,) in found]

    def _row(self, where: str, *values: object) -> RunRow | None:
        rows = self._rows(where, *values)
        return rows[0] if rows else None

    def _rows(self, where: str, *values: object) -> list[RunRow]:
        return [
            RunRow(*row) for row in self._fetch(f"SELECT {_COLUMNS} FROM runs {where}", *values)
        ]

    def _fetch(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise DataLoss(
                f"The ledger cannot be read ({error}); runs at work go on. Look at the disk, and "
                "restart the training server.",
                reason="LEDGER_UNREADABLE",
            ) from error

    def close(self) -> None:
        """Ends reading."""
        with self._lock:
            self._connection.close()


@dataclass(frozen=True)
class Acceptance:
    """A new run to be written: its spec, and `queued`, its first event; `done` holds its id."""

    request_id: str
    spec: pb.RunSpec
    steps_total: int
    queued: pb.RunEvent
    done: Future[str] = field(default_factory=Future)

    def write(self, connection: sqlite3.Connection) -> None:
        """Inserts the run and its first event."""
        spec_bytes, head = _canonical(self.spec), pb.RunSpec()
        head.CopyFrom(self.spec)
        head.ClearField("samples")
        connection.execute(
            "INSERT INTO runs (run_id, request_id, digest, spec, spec_head, state, created, "
            "steps_total) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.queued.run_id,
                self.request_id or None,
                hashlib.sha256(spec_bytes).digest(),
                spec_bytes,
                _canonical(head),
                pb.RUN_STATE_QUEUED,
                self.queued.event_time.ToNanoseconds(),
                self.steps_total,
            ),
        )
        write_events(connection, [self.queued])


def write_events(connection: sqlite3.Connection, events: Iterable[pb.RunEvent]) -> None:
    """Inserts events, in order, and updates their runs' rows. Events already there stay."""
    events = list(events)
    connection.executemany(
        "INSERT OR IGNORE INTO events (number, sequence, event) "
        "SELECT number, ?, ? FROM runs WHERE run_id = ?",
        [(event.sequence, event.SerializeToString(), event.run_id) for event in events],
    )
    for values in _merged(events).values():
        names = ", ".join(f"{name} = :{name}" for name in values if name != "run_id")
        connection.execute(f"UPDATE runs SET {names} WHERE run_id = :run_id", values)


def _merged(events: list[pb.RunEvent]) -> dict[str, dict[str, object]]:
    """Returns the columns that change, by run; of one column the last event counts."""
    changes: dict[str, dict[str, object]] = {}
    for event in events:
        columns = changes.setdefault(event.run_id, {"run_id": event.run_id})
        columns["last_sequence"] = event.sequence
        columns.update(_columns(event))
    return changes


def _columns(event: pb.RunEvent) -> dict[str, object]:
    when = event.event_time.ToNanoseconds()
    if event.HasField("started"):
        started = event.started
        columns: dict[str, object] = {
            "state": pb.RUN_STATE_RUNNING,
            "started": when,
            "steps_total": started.steps_total,
        }
        if not started.dry_run:
            # By these the optimizer's step is found again after a kill.
            columns |= {"optimizer_step": started.optimizer_step, "epoch": started.engine_epoch}
        return columns
    if event.HasField("step"):
        return {} if event.step.dry_run else {"steps_done": event.step.step}
    if event.HasField("finished"):
        finished = event.finished
        failed = finished.HasField("failure")
        return {
            "state": finished.state,
            "ended": when,
            "steps_done": finished.steps_done,
            "failure": finished.failure.SerializeToString() if failed else None,
        }
    return {}


def _time(nanoseconds: int) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp
