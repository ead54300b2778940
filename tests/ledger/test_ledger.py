"""The ledger: it gives back what it was given, in order, after a crash too, or says why not."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from apollo_grpc.errors import DataLoss, FailedPrecondition, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger import writer as ledger_writer
from apollo_trainer.ledger.entries import write_events
from apollo_trainer.ledger.file import FILE_NAME
from apollo_trainer.ledger.journal import SEGMENT_BYTES, Journal, read_journal
from apollo_trainer.ledger.retention import Retention
from tests.books import finish
from tests.waiting import HANG, slowness, wait_until


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
        log.append(step=pb.RunEvent.Step(step=step))
        while other.execute("SELECT MAX(sequence) FROM events").fetchone()[0] < step + 1:
            time.sleep(0.001)
        waits.append(time.monotonic() - began)
    assert sorted(waits)[len(waits) // 2] < 0.1 * slowness(), waits
    other.close()


def test_whoever_appends_does_not_wait_for_the_disk(open_books: Any, monkeypatch: Any) -> None:
    books, disk = open_books(), threading.Event()
    log = books.accept("a")

    def write_once_there_is_a_disk(*arguments: Any) -> None:
        assert disk.wait(HANG)
        write_events(*arguments)

    monkeypatch.setattr(ledger_writer, "write_events", write_once_there_is_a_disk)
    for step in range(1, 31):
        log.append(step=pb.RunEvent.Step(step=step))
    assert not log.kept_on_disk
    disk.set()
    wait_until(lambda: log.kept_on_disk, "the disk")


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
        connection.execute("PRAGMA user_version = 1000")
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
import os, sys, time
from pathlib import Path
from tests.books import Books
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger import journal

folder, steps, journal.SEGMENT_BYTES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
log = Books(folder).accept("a", "request")
log.open_journal(folder / "journal")
log.append(started=pb.RunEvent.Started(steps_total=9, optimizer_step=40, engine_epoch="e"))
for step in range(1, steps + 1):
    log.begin_step(step)
    log.append(step=pb.RunEvent.Step(step=step, loss=step / 10))
    while step % 20 == 0 and not log.kept_on_disk:
        time.sleep(0.001)
log.begin_step(steps + 1)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("steps", "segment_bytes"), [(7, SEGMENT_BYTES), pytest.param(111, 300, marks=pytest.mark.long)]
)
def test_a_killed_server_loses_no_step_and_says_which_is_in_doubt(
    open_books: Any, state_dir: Path, steps: int, segment_bytes: int
) -> None:
    arguments = (str(state_dir), str(steps), str(segment_bytes))
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=HANG)
    assert done.returncode == -9
    segments = {path.name for path in (state_dir / "journal").iterdir()}
    assert ("a" in segments) == (steps < 20), "short segments were removed"
    books = open_books()
    assert books.waiting == []
    events = books.ledger.events("a", 0, 200)
    assert [event.sequence for event in events] == list(range(1, steps + 4))
    told = [event.step.loss for event in events if event.HasField("step")]
    assert told == pytest.approx([n / 10 for n in range(1, steps + 1)])
    finished = events[-1].finished
    assert finished.failure.reason == "INTERRUPTED"
    assert (finished.steps_done, finished.next_step_in_doubt) == (steps, True)
    assert finished.state_steps_lost == steps
    assert f"{steps} of 9 steps" in finished.failure.message
    row = books.ledger.run("a")
    assert (row.state, row.steps_done, row.optimizer_step) == (pb.RUN_STATE_FAILED, steps, 40)
    assert not list((state_dir / "journal").iterdir())
    books.close()
    assert open_books().ledger.events("a", 0, 200) == events


def test_a_torn_journal_is_read_up_to_the_tear(open_books: Any, state_dir: Path) -> None:
    journal = Journal(state_dir, "a")
    for step in (1, 2):
        journal.begin(step)
        journal.event(pb.RunEvent(run_id="a", sequence=step))
    whole = (state_dir / "a").read_bytes()
    for length in range(len(whole)):
        (state_dir / "a").write_bytes(whole[:length])
        contents = read_journal(state_dir, "a")
        assert len(contents.events) <= contents.begun <= 2
        assert [e.sequence for e in contents.events] == [1, 2][: len(contents.events)]


def test_a_mistake_of_the_servers_ends_neither_the_ledgers_thread_nor_a_run(
    open_books: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = open_books()
    log = books.accept("a")

    def fail(*arguments: Any) -> None:
        raise RuntimeError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(ledger_writer, "write_events", fail)
        patch.setattr(Retention, "apply", fail)
        log.append(step=pb.RunEvent.Step(step=1))
        wait_until(lambda: log._unwritten, "the mistake")
        with pytest.raises(FailedPrecondition, match="a mistake") as caught:
            books.accept("b")
        assert caught.value.reason == "LEDGER_NOT_WRITTEN"
    wait_until(lambda: log.kept_on_disk, "the ledger")
    kinds = [event.WhichOneof("event") for event in books.ledger.events("a", 0, 9)]
    assert kinds == ["queued", "step", "warning"]
    finish(books.accept("c"))


def test_a_run_that_comes_after_the_end_is_refused_and_nobody_waits_for_it(open_books: Any) -> None:
    books = open_books()
    books.writer.stop()
    with pytest.raises(Unavailable, match="stopping"):
        books.accept("late")


# --- no room ------------------------------------------------------------------------------------

FULL = """
import resource, sys, time
from pathlib import Path
from tests.books import Books, finish
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import training_pb2 as pb

books = Books(Path(sys.argv[1]))
log = books.accept("active")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
for step in range(1, 301):
    log.append(step=pb.RunEvent.Step(step=step, loss=1.0))
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
        [sys.executable, "-c", FULL, str(state_dir)], capture_output=True, text=True, timeout=HANG
    )
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr
