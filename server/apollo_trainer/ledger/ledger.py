"""The ledger: runs, their specs and their events on disk. Here are the statements that read."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
# The state of a run that was deleted: of its row is left what says where the optimizer is.
DELETED = pb.RUN_STATE_UNSPECIFIED
# Bytes of events that are read for `WatchRuns` at once: a reader that does not read holds them.
PAGE_BYTES = 2**18


@dataclass(frozen=True)
class Choice:
    """Which runs are listed, and in which order.

    Attributes:
        states: one of which the run is in; empty: any.
        labels: all of which it has.
        name: that it has; empty: any.
    """

    states: Sequence[int] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    oldest_first: bool = False


@dataclass(frozen=True)
class RunRow:
    """One run as the ledger knows it; times in nanoseconds since 1970, 0 where unset.

    Attributes:
        number: rises with each accepted run.
        digest: `digest_of` the spec.
        spec_head: serialized spec without its samples and what holds some.
        optimizer_step: of the live optimizer when the run began.
        epoch: of the engine whose weights it changed.
        pruned_through: events up to this sequence were removed.
        in_doubt: whether one step more than `steps_done` may be in the weights.
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
    last_loss: float | None
    weight_version: int | None
    in_doubt: int

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
            request_id=self.request_id or "",
            last_loss=self.last_loss,
            weight_version=self.weight_version,
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
    return hashlib.sha256(canonical(spec)).digest()


def canonical(spec: pb.RunSpec) -> bytes:
    """Serializes a spec to the same bytes each time."""
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
        return self._row("WHERE run_id = ? AND state != ?", run_id, DELETED)

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

    def page(self, choice: Choice, size: int, beyond: int | None = None) -> list[RunRow]:
        """Returns the first runs of a choice, or those that follow the run of a number."""
        conditions, values = ["state != ?"], list[object]([DELETED])
        if choice.states:
            conditions.append(f"state IN ({', '.join('?' * len(choice.states))})")
            values += choice.states
        if choice.name:
            conditions.append("name = ?")
            values.append(choice.name)
        for label in choice.labels.items():
            conditions.append("number IN (SELECT number FROM labels WHERE label = ? AND value = ?)")
            values += label
        if beyond is not None:
            conditions.append("number > ?" if choice.oldest_first else "number < ?")
            values.append(beyond)
        order = "number" if choice.oldest_first else "number DESC"
        where = f"WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT ?"
        return self._rows(where, *values, size)

    def spec(self, run_id: str) -> pb.RunSpec | None:
        """Returns a run's whole spec; None once it was pruned."""
        found = self.fetch(
            "SELECT spec FROM specs WHERE number = (SELECT number FROM runs WHERE run_id = ?)",
            run_id,
        )
        return pb.RunSpec.FromString(found[0][0]) if found else None

    def events(self, run_id: str, after: int, limit: int) -> list[pb.RunEvent]:
        """Returns the next events of a run after a sequence."""
        found = self.fetch(
            "SELECT event FROM events WHERE number = (SELECT number FROM runs WHERE run_id = ?) "
            "AND sequence > ? ORDER BY sequence LIMIT ?",
            run_id,
            after,
            limit,
        )
        return [pb.RunEvent.FromString(event) for (event,) in found]

    def newest_revision(self) -> int:
        """Returns the last revision that was given; 0 before the first event."""
        found = self.fetch("SELECT seq FROM sqlite_sequence WHERE name = 'events'")
        return int(found[0][0]) if found else 0

    def pruned_revision(self) -> int:
        """Returns the greatest revision whose event was pruned; 0 where none was."""
        return int(self.fetch("SELECT through FROM pruned")[0][0])

    def revised(self, after: int, limit: int) -> list[tuple[int, bytes]]:
        """Returns the next events of all runs after a revision, serialized.

        At most so many, and no more once they have PAGE_BYTES.
        """
        page, size = list[tuple[int, bytes]](), 0
        statement = (
            "SELECT revision, event FROM events WHERE revision > ? ORDER BY revision LIMIT ?"
        )
        with self._reading() as connection:
            for revision, event in connection.execute(statement, (after, limit)):
                page.append((revision, event))
                size += len(event)
                if size >= PAGE_BYTES:
                    break
        return page

    def _row(self, where: str, *values: object) -> RunRow | None:
        rows = self._rows(where, *values)
        return rows[0] if rows else None

    def _rows(self, where: str, *values: object) -> list[RunRow]:
        found = self.fetch(f"SELECT {_COLUMNS} FROM runs {where}", *values)
        return [RunRow(*row) for row in found]

    def fetch(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Returns all rows of a statement that reads."""
        with self._reading() as connection:
            return connection.execute(statement, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                yield self._connection
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


def _time(nanoseconds: int) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp
