"""The ledger: it gives back what it was given, in order, after a crash too, or says why not."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from apollo_grpc.errors import DataLoss, FailedPrecondition
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.runs.events import EventLog, now
from apollo_trainer.runs.ledger import Acceptance, Ledger
from apollo_trainer.runs.ledger_file import FILE_NAME, LedgerFile
from apollo_trainer.runs.ledger_writer import LedgerWriter
from apollo_trainer.runs.queue import Store
from apollo_trainer.runs.recovery import settle
from apollo_trainer.runs.retention import Retention

KEEP_ALL = Retention(seconds=1e9, bytes=2**40)
SPEC = pb.RunSpec(samples=[pb.Sample(weight=1.0)], epochs=3)


class Books:
    """A ledger with its writer, as a server opens them."""

    def __init__(self, folder: Path, retention: Retention = KEEP_ALL):
        file = LedgerFile(folder)
        self.ledger = Ledger(file)
        self.waiting = settle(file, self.ledger, folder)
        self.writer = LedgerWriter(file, retention)

    def accept(self, run_id: str, request_id: str = "") -> EventLog:
        queued = pb.RunEvent(run_id=run_id, sequence=1, event_time=now(), queued=pb.Queued())
        log = EventLog(run_id, lambda event: None, Store(self.ledger, self.writer))
        log.begin_with(queued)
        self.writer.accept(Acceptance(request_id, SPEC, 3, queued)).result(10)
        log.committed(1)
        return log

    def close(self) -> None:
        self.writer.stop()
        self.ledger.close()


@pytest.fixture
def open_books(state_dir: Path) -> Iterator[Callable[..., Books]]:
    opened: list[Books] = []

    def start(**options: Any) -> Books:
        opened.append(Books(state_dir, **options))
        return opened[-1]

    yield start
    for books in opened:
        if books.writer._thread.is_alive():
            books.close()


def finish(log: EventLog, steps: int = 0) -> None:
    finished = pb.Finished(state=pb.RUN_STATE_SUCCEEDED, steps_done=steps)
    log.append(finished=finished)


def test_the_file_is_the_users_alone(open_books: Any, state_dir: Path) -> None:
    open_books().accept("a")
    for path in state_dir.glob("ledger*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_an_accepted_run_is_on_disk_when_its_caller_hears_of_it(
    open_books: Any, state_dir: Path
) -> None:
    open_books().accept("a", "request")
    with sqlite3.connect(state_dir / FILE_NAME) as other:
        assert other.execute("SELECT run_id, request_id FROM runs").fetchall() == [("a", "request")]


def test_an_event_is_on_disk_within_a_tenth_of_a_second(open_books: Any, state_dir: Path) -> None:
    log = open_books().accept("a")
    other, waits = sqlite3.connect(state_dir / FILE_NAME), []
    for step in range(1, 31):
        began = time.monotonic()
        log.append(step=pb.Step(step=step))
        assert time.monotonic() - began < 0.05, "whoever appends does not wait for the disk"
        while other.execute("SELECT MAX(sequence) FROM events").fetchone()[0] < step + 1:
            time.sleep(0.001)
        waits.append(time.monotonic() - began)
    assert sorted(waits)[len(waits) // 2] < 0.1, waits
    other.close()


def test_a_second_server_on_one_ledger_is_refused(open_books: Any) -> None:
    open_books()
    with pytest.raises(FailedPrecondition, match="Another server") as caught:
        open_books()
    assert caught.value.reason == "LEDGER_TAKEN"


def test_a_ledger_of_a_newer_version_is_refused_and_left_alone(
    open_books: Any, state_dir: Path
) -> None:
    open_books().close()
    with sqlite3.connect(state_dir / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 2")
    before = (state_dir / FILE_NAME).read_bytes()
    with pytest.raises(FailedPrecondition, match="newer") as caught:
        open_books()
    assert caught.value.reason == "LEDGER_NEWER"
    assert (state_dir / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("damage", [slice(0, 16), slice(5000, 9000)])
def test_a_damaged_ledger_is_refused_in_words(
    open_books: Any, state_dir: Path, damage: slice
) -> None:
    books = open_books()
    for number in range(100):
        finish(books.accept(f"run {number}"))
    books.close()
    path = state_dir / FILE_NAME
    data = bytearray(path.read_bytes())
    data[damage] = b"\xa5" * (damage.stop - damage.start)
    path.write_bytes(data)
    with pytest.raises(FailedPrecondition, match="move it away") as caught:
        open_books()
    assert caught.value.reason == "LEDGER_DAMAGED"
    assert path.read_bytes() == bytes(data)


def test_a_ledger_damaged_under_a_reader_is_data_loss(open_books: Any, state_dir: Path) -> None:
    books = open_books()
    books.ledger._connection.execute("PRAGMA query_only = 1")
    books.ledger.close()
    with pytest.raises(DataLoss) as caught:
        books.ledger.run("a")
    assert caught.value.reason == "LEDGER_UNREADABLE"


KILLED = """
import os, sys
from pathlib import Path
from tests.runs.test_ledger import Books
from apollo_grpc.v1 import training_pb2 as pb

folder = Path(sys.argv[1])
log = Books(folder).accept("a", "request")
log.open_journal(folder / "journal")
log.append(started=pb.Started(steps_total=9, optimizer_step=40, engine_epoch="e"))
for step in range(1, 8):
    log.begin_step(step)
    log.append(step=pb.Step(step=step, loss=step / 10))
log.begin_step(8)
os.kill(os.getpid(), 9)
"""


def test_a_killed_server_loses_no_step_and_says_which_is_in_doubt(
    open_books: Any, state_dir: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(state_dir)], timeout=60)
    assert done.returncode == -9
    books = open_books()
    assert books.waiting == []
    events = books.ledger.events("a", 0, 100)
    assert [event.sequence for event in events] == list(range(1, 11))
    assert [e.step.loss for e in events[2:9]] == pytest.approx([n / 10 for n in range(1, 8)])
    finished = events[-1].finished
    assert finished.failure.reason == "INTERRUPTED"
    assert (finished.steps_done, finished.next_step_in_doubt) == (7, True)
    assert finished.state_steps_lost == 7
    assert "7 of 9 steps" in finished.failure.message
    row = books.ledger.run("a")
    assert (row.state, row.steps_done, row.optimizer_step) == (pb.RUN_STATE_FAILED, 7, 40)
    assert not list((state_dir / "journal").iterdir())
    books.close()
    assert open_books().ledger.events("a", 0, 100) == events


def test_a_torn_journal_is_read_up_to_the_tear(open_books: Any, state_dir: Path) -> None:
    from apollo_trainer.runs.journal import Journal, read_journal

    journal = Journal(state_dir, "a")
    for step in (1, 2):
        journal.begin(step)
        journal.event(pb.RunEvent(run_id="a", sequence=step).SerializeToString())
    whole = (state_dir / "a").read_bytes()
    for length in range(len(whole)):
        (state_dir / "a").write_bytes(whole[:length])
        contents = read_journal(state_dir / "a")
        assert len(contents.events) <= contents.begun <= 2
        assert [e.sequence for e in contents.events] == [1, 2][: len(contents.events)]


# --- no room ------------------------------------------------------------------------------------

FULL = """
import resource, sys, time
from pathlib import Path
from tests.runs.test_ledger import Books, finish
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import training_pb2 as pb

books = Books(Path(sys.argv[1]))
log = books.accept("active")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
for step in range(1, 301):
    log.append(step=pb.Step(step=step, loss=1.0))
while not log._unwritten:
    time.sleep(0.01)
try:
    books.accept("refused")
except FailedPrecondition as error:
    assert error.reason == "LEDGER_NOT_WRITTEN", error.reason
    assert "Make room" in error.message
else:
    raise SystemExit("a run was accepted without a ledger")
import asyncio
async def read():
    found = []
    async for event in log.follow():
        found.append(event)
        if len(found) == 302:
            return found
told = asyncio.run(read())
assert [e.sequence for e in told] == list(range(1, 303))
assert [e.warning.reason for e in told if e.HasField("warning")] == ["LEDGER_NOT_WRITTEN"]
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
finish(log, 300)
deadline = time.monotonic() + 20
while not log.kept_on_disk:
    assert time.monotonic() < deadline
    time.sleep(0.01)
books.accept("taken again")
assert [e.sequence for e in books.ledger.events("active", 0, 1000)] == list(range(1, 304))
books.close()
print("good")
"""


def test_without_room_a_run_goes_on_new_ones_are_refused_and_nothing_is_lost(
    state_dir: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(state_dir)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


# --- retention ----------------------------------------------------------------------------------


def prune(books: Books) -> None:
    """Retention until it has nothing more to do."""
    connection = sqlite3.connect(books.writer._file.path, isolation_level=None, timeout=10)
    while books.writer._retention.apply(connection):
        pass
    connection.close()


def test_events_and_specs_of_old_runs_go_and_their_requests_are_still_known(
    open_books: Any,
) -> None:
    books = open_books(retention=Retention(seconds=0.2, bytes=2**40))
    old = books.accept("old", "request")
    old.append(step=pb.Step(step=1))
    finish(old)
    time.sleep(0.5)
    young = books.accept("young")
    prune(books)
    row = books.ledger.run_of_request("request")
    assert (row.run_id, row.last_sequence, row.pruned_through) == ("old", 3, 3)
    assert books.ledger.spec("old") is None
    assert books.ledger.events("old", 0, 10) == []
    assert books.ledger.spec("young") == SPEC
    assert young.sequence == 1


def test_a_ledger_that_is_too_large_lets_go_of_the_oldest_and_gives_the_room_back(
    open_books: Any, state_dir: Path
) -> None:
    limit = 400_000
    books = open_books(retention=Retention(seconds=1e9, bytes=limit))
    for number in range(12):
        log = books.accept(f"run {number:2}")
        for step in range(1, 601):
            log.append(step=pb.Step(step=step, loss=0.1, grad_norm=0.2, learning_rate=0.3))
        finish(log, 600)
        while not log.kept_on_disk:
            time.sleep(0.005)
    prune(books)
    books.ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    assert (state_dir / FILE_NAME).stat().st_size < 1.5 * limit
    kept = [bool(books.ledger.events(f"run {n:2}", 0, 1)) for n in range(12)]
    assert kept[-1]
    assert kept == sorted(kept)
    assert books.ledger.run("run  0").last_sequence == 602


def test_a_run_at_work_that_is_too_large_lets_go_of_its_oldest_events(open_books: Any) -> None:
    books = open_books(retention=Retention(seconds=1e9, bytes=200_000))
    log = books.accept("a")
    for step in range(1, 10_001):
        log.append(step=pb.Step(step=step, loss=0.1))
    while not log.kept_on_disk:
        time.sleep(0.005)
    prune(books)
    row, kept = books.ledger.run("a"), books.ledger.events("a", 0, 20_000)
    assert 0 < row.pruned_through < row.last_sequence == 10_001
    assert [e.sequence for e in kept] == list(range(row.pruned_through + 1, 10_002))


def test_retention_does_not_hold_events_up(open_books: Any) -> None:
    books = open_books(retention=Retention(seconds=1e9, bytes=300_000))
    for number in range(30):
        log = books.accept(f"run {number}")
        for step in range(1, 401):
            log.append(step=pb.Step(step=step, loss=0.1))
        finish(log)
    log, waits = books.accept("last"), []
    pruner = threading.Thread(target=prune, args=[books])
    pruner.start()
    step = 0
    while pruner.is_alive() or step < 10:
        step += 1
        began = time.monotonic()
        log.append(step=pb.Step(step=step))
        while not log.kept_on_disk:
            time.sleep(0.001)
        waits.append(time.monotonic() - began)
    pruner.join()
    assert sorted(waits)[len(waits) // 2] < 0.2, waits


# --- against a model ----------------------------------------------------------------------------


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

    @rule()
    def accept(self) -> None:
        run_id = f"run {len(self._model)}"
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
            log.append(started=pb.Started(steps_total=9, engine_epoch="e"))
            self._model[run_id].append("started")
            self._begun.add(run_id)
        for _ in range(count):
            step = self._model[run_id].count("step") + 1
            log.begin_step(step)
            log.append(step=pb.Step(step=step))
            self._model[run_id].append("step")

    @precondition(lambda self: self._logs)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        run_id = self._some(data)
        finish(self._logs.pop(run_id))
        self._model[run_id].append("finished")
        self._ended.add(run_id)

    @rule()
    def reopen(self) -> None:
        """As after a stop in mid-run: what was at work has been interrupted."""
        self._books.close()
        self._books = Books(self._path)
        for run_id in self._begun - self._ended:
            self._model[run_id].append("finished")
            self._ended.add(run_id)
            del self._logs[run_id]
        assert [row.run_id for row in self._books.waiting] == sorted(
            self._logs, key=lambda name: int(name.split()[1])
        )
        for row in self._books.waiting:
            store = Store(self._books.ledger, self._books.writer)
            log = EventLog(row.run_id, lambda event: None, store, row.last_sequence)
            self._logs[row.run_id] = log

    @invariant()
    def what_is_read_is_what_was_written(self) -> None:
        for log in self._logs.values():
            while not log.kept_on_disk:
                time.sleep(0.001)
        for run_id in self._model.keys() - self._ended:
            self._check(run_id)

    def _check(self, run_id: str) -> None:
        events, row = self._books.ledger.events(run_id, 0, 10_000), self._books.ledger.run(run_id)
        assert [e.WhichOneof("event") for e in events] == self._model[run_id]
        assert [e.sequence for e in events] == list(range(1, len(events) + 1))
        assert row.last_sequence == len(events)
        assert row.has_ended == (run_id in self._ended)
        assert self._books.ledger.run_of_request(f"request {run_id}") == row

    def teardown(self) -> None:
        self._books.close()
        self._books = Books(self._path)
        for run_id in self._begun - self._ended:
            self._model[run_id].append("finished")
            self._ended.add(run_id)
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
