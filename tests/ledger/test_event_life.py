"""The life of an event log: whatever comes in whatever order, and nothing after its end."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import apollo_trainer.ledger.journal as journal_module
from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.events import EventLog, Life
from apollo_trainer.ledger.journal import FOLDER, SEGMENT_BYTES, Journal, journals_in, read_journal
from tests.books import finish
from tests.waiting import HANG, wait_until


class Desk:
    """A store that writes when it is told to."""

    def __init__(self) -> None:
        self.waiting, self.written = deque[pb.RunEvent](), list[pb.RunEvent]()

    def append(self, sink: EventLog, event: pb.RunEvent) -> None:
        self.waiting.append(event)

    def events(self, run_id: str, after: int, limit: int) -> list[pb.RunEvent]:
        return self.written[after : after + limit]

    def write(self, log: EventLog, count: int) -> None:
        for _ in range(min(count, len(self.waiting))):
            self.written.append(self.waiting.popleft())
        log.committed(len(self.written))

    def after_a_kill(self, folder: Path) -> list[pb.RunEvent]:
        """All that a start finds: what was written, and what the journal has beyond it."""
        found = list(self.written)
        for event in read_journal(folder, "run").events:
            if event.sequence == len(found) + 1:
                found.append(event)
        return found


async def read(log: EventLog) -> tuple[list[pb.RunEvent], str]:
    """All that a reader gets, and the reason why that was not all."""
    events: list[pb.RunEvent] = []
    try:
        async with asyncio.timeout(HANG):
            async for event in log.follow():
                events.append(event)
    except Unavailable as error:
        return events, error.reason
    return events, ""


class LifeMachine(RuleBasedStateMachine):
    """Against a list, a count of what is written, and a word for how far the log is."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        # A few steps fill a segment.
        self._patch.setattr(journal_module, "SEGMENT_BYTES", 200)
        self._temporary = tempfile.TemporaryDirectory(prefix="apollo-")
        self._folder, self._desk = Path(self._temporary.name), Desk()
        self._shown: list[pb.RunEvent] = []
        self._settled = 0
        self._log = EventLog("run", self._shown.append, self._desk, settled=self._settle)
        self._log.open_journal(self._folder)
        self._kinds: list[str] = []
        self._begun = 0
        self._life, self._refused, self._stopped = Life.OPEN, False, False

    def _settle(self) -> None:
        self._settled += 1

    def _append(self, kind: str, **event: Any) -> None:
        taken = self._log.append(**{kind: event[kind]})
        assert taken == (self._life is Life.OPEN)
        if taken:
            self._kinds.append(kind)

    @rule()
    def begin_a_step(self) -> None:
        step = self._kinds.count("step") + 1
        self._log.begin_step(step)
        if self._life is Life.OPEN:
            self._begun = step

    @rule()
    def end_a_step(self) -> None:
        self.begin_a_step()
        self._append("step", step=pb.RunEvent.Step(step=self._kinds.count("step") + 1))

    @rule(kind=st.sampled_from(["warning", "state_saved"]))
    def tell(self, kind: str) -> None:
        events = {"warning": pb.Notice(message="x" * 50), "state_saved": pb.RunEvent.StateSaved()}
        self._append(kind, **events)

    @rule()
    def end(self) -> None:
        self._append("finished", finished=pb.RunEvent.Finished())
        if self._life is Life.OPEN:
            self._life = Life.FINISHED

    @precondition(lambda self: not self._stopped)
    @rule(count=st.integers(1, 9))
    def commit(self, count: int) -> None:
        self._desk.write(self._log, count)
        if not self._desk.waiting:
            self._refused = False
            if self._life is Life.FINISHED:
                self._life = Life.CLOSED

    @precondition(lambda self: self._desk.waiting and not self._stopped)
    @rule()
    def refuse(self) -> None:
        self._log.not_written("no room")
        if not self._refused and self._life is Life.OPEN:
            self._kinds.append("warning")
        self._refused = True

    @rule()
    def close(self) -> None:
        """As the server's stop does, once the ledger's thread has ended."""
        self._stopped = True
        self._log.close()
        self._life = Life.CLOSED

    @invariant()
    def it_is_what_the_list_is(self) -> None:
        kept = [*self._desk.written, *self._desk.waiting]
        assert [event.WhichOneof("event") for event in kept] == self._kinds
        assert [event.sequence for event in kept] == list(range(1, len(kept) + 1))
        assert (self._log.sequence, self._log.life) == (len(kept), self._life)
        assert self._log.ended == ("finished" in self._kinds)
        told = len(kept) if self._refused else len(self._desk.written)
        assert self._shown == kept[:told]

    @invariant()
    def a_kill_now_loses_nothing(self) -> None:
        kept = [*self._desk.written, *self._desk.waiting]
        assert self._desk.after_a_kill(self._folder) == kept
        if self._settled:
            assert not list(self._folder.iterdir())
            return
        steps = self._kinds.count("step")
        assert (read_journal(self._folder, "run").begun > steps) == (self._begun > steps)

    def teardown(self) -> None:
        self.close()
        events, reason = asyncio.run(read(self._log))
        assert events == self._shown
        assert reason == ("" if events and events[-1].HasField("finished") else "SERVER_STOPPING")
        assert self._settled == ("finished" in self._kinds and not self._desk.waiting)
        self._temporary.cleanup()
        self._patch.undo()


LifeMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("LIFE_EXAMPLES", "60")),
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
)


TestLife = LifeMachine.TestCase


def test_what_comes_after_the_end_is_dropped_and_written_into_no_file(
    open_books: Any, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    books = open_books()
    log = books.accept("a")
    log.open_journal(state_dir / FOLDER)
    finish(log)
    wait_until(lambda: log.life is Life.CLOSED, "the end")
    # They get the numbers that the journal's descriptor was one of.
    others = [(state_dir / f"other {n}").open("wb") for n in range(8)]
    with caplog.at_level(logging.WARNING):
        assert not log.append(state_saved=pb.RunEvent.StateSaved(optimizer_step=3))
    log.begin_step(9)
    assert [os.fstat(file.fileno()).st_size for file in others] == [0] * 8
    assert "run a has ended" in caplog.text
    assert "state_saved" in caplog.text
    books.writer.stop()
    assert [e.WhichOneof("event") for e in books.ledger.events("a", 0, 9)] == ["queued", "finished"]
    for file in others:
        file.close()


async def test_a_reader_waits_for_no_disk_that_somebody_else_writes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, at_work, may_write = (
        EventLog("run", lambda event: None),
        threading.Event(),
        threading.Event(),
    )
    log.append(queued=pb.RunEvent.Queued())
    log.open_journal(tmp_path)

    def write_slowly(*arguments: Any) -> None:
        at_work.set()
        assert may_write.wait(HANG)

    monkeypatch.setattr(Journal, "event", write_slowly)
    training = threading.Thread(target=lambda: log.append(finished=pb.RunEvent.Finished()))
    training.start()
    assert at_work.wait(HANG)
    reader = log.follow()
    async with asyncio.timeout(1):
        assert (await anext(reader)).HasField("queued")
    assert not log.ended
    may_write.set()
    async with asyncio.timeout(HANG):
        assert [event.sequence async for event in reader] == [2]
    training.join()


# --- a journal that is cut ------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


class Kernel:
    """`os`, whose next call after so many is never made."""

    def __init__(self, calls: int):
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        if name not in ("open", "write", "close", "ftruncate", "unlink"):
            return getattr(os, name)

        def call(*arguments: Any) -> Any:
            if not self.calls:
                raise Killed
            self.calls -= 1
            return getattr(os, name)(*arguments)

        return call


def take_steps(journal: Journal, desk: Desk, steps: int) -> int:
    """Takes steps that the ledger has later, until a kill; returns the one that it came in."""
    for step in range(1, steps + 1):
        try:
            journal.begin(step)
            event = pb.RunEvent(run_id="run", sequence=step, step=pb.RunEvent.Step(step=step))
            journal.event(event, len(desk.written))
        except Killed:
            return step
        desk.waiting.append(event)
        # All of them every seventh step, four behind otherwise.
        while len(desk.waiting) > (4 if step % 7 else 0):
            desk.written.append(desk.waiting.popleft())
    return 0


def test_a_kill_at_any_instant_loses_no_event_and_no_step_that_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 200)
    instant, removed = 0, 0
    while True:
        kernel, desk, folder = Kernel(instant), Desk(), tmp_path / str(instant)
        with monkeypatch.context() as patch:
            patch.setattr(journal_module, "os", kernel)
            patch.setattr(Path, "unlink", lambda path, os=kernel, **_: os.unlink(path))
            try:
                journal = Journal(folder, "run")
            except Killed:
                instant += 1
                continue
            killed = take_steps(journal, desk, 40)
        if not killed:
            break
        os.close(journal._descriptor)
        contents, found = read_journal(folder, "run"), desk.after_a_kill(folder)
        assert [event.sequence for event in found][: killed - 1] == list(range(1, killed))
        # It is in the weights wholly, is told to be in doubt, or had not begun to be written.
        assert contents.begun in (killed - 1, killed)
        assert len(found) <= contents.begun
        removed += not (folder / "run").exists()
        instant += 1
    assert removed > 20, "segments were removed before most of the kills"


def test_very_many_steps_leave_a_short_journal(open_books: Any, state_dir: Path) -> None:
    books, folder = open_books(), state_dir / FOLDER
    log = books.accept("a")
    log.open_journal(folder)
    written = 0
    for step in range(1, 15_001):
        log.begin_step(step)
        log.append(step=pb.RunEvent.Step(step=step, loss=1 / step, grad_norm=step / 3, tokens=step))
        if step % 1000 == 0:
            wait_until(lambda: log.kept_on_disk, "the ledger")
            written = sum(path.stat().st_size for path in folder.iterdir())
            assert written <= 2 * SEGMENT_BYTES + 1000 * 100
    assert len(list(folder.iterdir())) <= 2
    assert journals_in(folder) == ["a"]
    assert read_journal(folder, "a").begun == 15_000
    finish(log)
    wait_until(lambda: log.life is Life.CLOSED, "the end")
    wait_until(lambda: not list(folder.iterdir()), "its files' end")
