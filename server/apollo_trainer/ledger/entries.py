"""What is written to the ledger: new runs, their events, and that a run is deleted."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.ledger import DELETED, canonical


@dataclass(frozen=True)
class Acceptance:
    """A new run to be written: its spec, and `queued`, its first event; `done` holds its id."""

    request_id: str
    spec: pb.RunSpec
    steps_total: int
    queued: pb.RunEvent
    done: Future[str] = field(default_factory=Future)

    @property
    def run_id(self) -> str:
        """Of the new run."""
        return self.queued.run_id

    def write(self, connection: sqlite3.Connection) -> None:
        """Inserts the run and its first event."""
        spec = canonical(self.spec)
        number = connection.execute(
            "INSERT INTO runs (run_id, request_id, digest, spec_head, state, created, steps_total, "
            "name) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.run_id,
                self.request_id or None,
                hashlib.sha256(spec).digest(),
                canonical(_without_samples(self.spec)),
                pb.RUN_STATE_QUEUED,
                self.queued.event_time.ToNanoseconds(),
                self.steps_total,
                self.spec.name,
            ),
        ).lastrowid
        connection.execute("INSERT INTO specs VALUES (?, ?)", (number, spec))
        labels = [(label, value, number) for label, value in self.spec.labels.items()]
        connection.executemany("INSERT INTO labels VALUES (?, ?, ?)", labels)
        write_events(connection, [self.queued])


@dataclass(frozen=True)
class Deletion:
    """A run that has ended and is to be deleted; `done` holds its id."""

    run_id: str
    done: Future[str] = field(default_factory=Future)

    def write(self, connection: sqlite3.Connection) -> None:
        """Deletes all but what says where the optimizer is."""
        found = connection.execute("SELECT number FROM runs WHERE run_id = ?", (self.run_id,))
        for number in found.fetchall():
            for table in ("events", "specs", "labels"):
                connection.execute(f"DELETE FROM {table} WHERE number = ?", number)
            connection.execute(
                "UPDATE runs SET state = ?, request_id = NULL, digest = x'', spec_head = x'', "
                "name = '', failure = NULL, last_loss = NULL WHERE number = ?",
                (DELETED, *number),
            )


def _without_samples(spec: pb.RunSpec) -> pb.RunSpec:
    head = pb.RunSpec()
    head.CopyFrom(spec)
    for field_name in ("samples", "evaluation_samples", "probes"):
        head.ClearField(field_name)
    if head.HasField("anchors"):
        head.anchors.ClearField("samples")
    return head


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


def _version_after(finished: pb.RunEvent.Finished) -> int | None:
    """None for a run that tells none, as it never began or was cut off."""
    succeeded = finished.state == pb.RUN_STATE_SUCCEEDED
    return finished.weight_version if succeeded or finished.weight_version else None


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
        step = event.step
        done = {} if step.dry_run else {"steps_done": step.step}
        return {"last_loss": step.loss, **done}
    if event.HasField("finished"):
        finished = event.finished
        failed = finished.HasField("failure")
        return {
            "state": finished.state,
            "ended": when,
            "steps_done": finished.steps_done,
            "failure": finished.failure.SerializeToString() if failed else None,
            "weight_version": _version_after(finished),
            "in_doubt": finished.next_step_in_doubt,
        }
    return {}
