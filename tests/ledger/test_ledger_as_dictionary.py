"""Whatever is done to a ledger in whatever order, it is what a dictionary would be."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.events import EventLog
from tests.books import Books, finish


class LedgerMachine(RuleBasedStateMachine):
    """Whatever is done in whatever order, reopened or not: the ledger is what a dictionary is."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="apollo-")
        self._path = Path(self._folder.name)
        self._books = Books(self._path)
        self._logs: dict[str, EventLog] = {}
        self._model: dict[str, list[str]] = {}
        self._ended: set[str] = set()
        self._begun: set[str] = set()
        self._deleted: set[str] = set()
        self._given: dict[tuple[str, int], int] = {}
        self._newest = 0

    @rule()
    def accept(self) -> None:
        run_id = f"run {len(self._model) + len(self._deleted)}"
        self._logs[run_id] = self._books.accept(run_id, f"request {run_id}")
        self._model[run_id] = ["queued"]

    def _some(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self._logs)))

    @precondition(lambda self: self._logs)
    @rule(data=st.data(), count=st.integers(1, 40))
    def take_steps(self, data: st.DataObject, count: int) -> None:
        run_id = self._some(data)
        log = self._logs[run_id]
        if run_id not in self._begun:
            log.open_journal(self._path / "journal")
            log.append(started=pb.RunEvent.Started(steps_total=9, engine_epoch="e"))
            self._model[run_id].append("started")
            self._begun.add(run_id)
        for _ in range(count):
            step = self._model[run_id].count("step") + 1
            log.begin_step(step)
            log.append(step=pb.RunEvent.Step(step=step))
            self._model[run_id].append("step")

    @precondition(lambda self: self._logs)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        run_id = self._some(data)
        finish(self._logs.pop(run_id))
        self._model[run_id].append("finished")
        self._ended.add(run_id)

    @precondition(lambda self: self._ended)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted(self._ended)))
        # Its end is on the disk, or nobody would know that it may be deleted.
        while not (row := self._books.ledger.run(run_id)) or not row.has_ended:
            time.sleep(0.001)
        self._books.delete(run_id)
        self._ended.remove(run_id)
        self._begun.discard(run_id)
        self._deleted.add(run_id)
        del self._model[run_id]

    @rule()
    def reopen(self) -> None:
        """As after a stop in mid-run: what was at work has been interrupted."""
        self._restart()
        assert [row.run_id for row in self._books.waiting] == sorted(
            self._logs, key=lambda name: int(name.split()[1])
        )
        for row in self._books.waiting:
            writer = self._books.writer
            log = EventLog(row.run_id, lambda event: None, writer, row.last_sequence)
            self._logs[row.run_id] = log

    def _restart(self) -> None:
        self._books.close()
        self._books = Books(self._path)
        for run_id in self._begun - self._ended:
            self._model[run_id].append("finished")
            self._ended.add(run_id)
            del self._logs[run_id]

    @invariant()
    def what_is_read_is_what_was_written(self) -> None:
        for log in self._logs.values():
            while not log.kept_on_disk:
                time.sleep(0.001)
        for run_id in self._model.keys() - self._ended:
            self._check(run_id)
        for run_id in self._deleted:
            assert self._books.ledger.run(run_id) is None
            assert self._books.ledger.run_of_request(f"request {run_id}") is None
            assert self._books.ledger.events(run_id, 0, 1) == []
        self._check_revisions()

    def _check_revisions(self) -> None:
        """They rise by run, and what was given once stays as long as its event does."""
        given = dict[tuple[str, int], int]()
        for revision, data in self._books.ledger.revised(0, 10_000):
            event = pb.RunEvent.FromString(data)
            given[event.run_id, event.sequence] = revision
        # The end of one that has ended may still be on its way.
        assert self._events(self._model.keys() - self._ended) <= given.keys()
        assert given.keys() <= self._events(self._model.keys())
        for (run_id, sequence), revision in given.items():
            assert given.get((run_id, sequence - 1), 0) < revision
            assert self._given.get((run_id, sequence), revision) == revision
        assert all(
            revision > self._newest for key, revision in given.items() if key not in self._given
        )
        self._given, self._newest = given, max([self._newest, *given.values()])

    def _events(self, run_ids: Iterable[str]) -> set[tuple[str, int]]:
        """The events that runs have."""
        return {(run, 1 + index) for run in run_ids for index in range(len(self._model[run]))}

    def _check(self, run_id: str) -> None:
        events, row = self._books.ledger.events(run_id, 0, 10_000), self._books.ledger.run(run_id)
        assert [e.WhichOneof("event") for e in events] == self._model[run_id]
        assert [e.sequence for e in events] == list(range(1, len(events) + 1))
        assert row.last_sequence == len(events)
        assert row.has_ended == (run_id in self._ended)
        assert self._books.ledger.run_of_request(f"request {run_id}") == row

    def teardown(self) -> None:
        self._restart()
        for run_id in self._model:
            self._check(run_id)
        self._books.close()
        self._folder.cleanup()


LedgerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("LEDGER_EXAMPLES", "15")),
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLedger = LedgerMachine.TestCase
