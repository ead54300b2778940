"""The events of a run: kept in order, without gaps, and followed by any number of readers.

A reader sees an event once it is on disk: what was seen is there after a crash, too, under the
same number.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from apollo_grpc.errors import OutOfRange, Unavailable
from apollo_grpc.times import now
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.runs.journal import Journal

log = logging.getLogger(__name__)
# Events of a run at work that are kept in memory for its readers; older ones are read from disk.
TAIL = 1024
PAGE = 512


class Store(Protocol):
    """Where events go, and where those that are no longer in memory come from."""

    def append(self, sink: EventLog, event: pb.RunEvent) -> None:
        """Has an event written, without waiting; the log is told when it is."""

    def events(self, run_id: str, after: int, limit: int) -> list[pb.RunEvent]:
        """The next written events after a sequence; reads the disk."""


class Life(Enum):
    """How far a log is; it never goes back."""

    OPEN = "takes events"
    ENDED = "has `finished`, which is not on disk yet"
    CLOSED = "is on disk, or is left to the next start: nothing of it is written any more"


class EventLog:
    """One run's events: appended by any thread but the event loops', followed from those.

    Appending may wait for the journal's write, and neither for a reader nor for the ledger. What
    comes after the end is dropped.

    Args:
        run_id: of the run.
        publish: is told every event when its readers are, on the thread that shows it.
        store: keeps the events; without one they are in memory alone.
        sequence: of the last event that the store has already.
        settled: is told once the run has finished and all of it is on disk, on the ledger's thread.
    """

    def __init__(
        self,
        run_id: str,
        publish: Callable[[pb.RunEvent], None],
        store: Store | None = None,
        sequence: int = 0,
        settled: Callable[[], None] = lambda: None,
    ):
        self.run_id = run_id
        self._publish, self._store, self._settled = publish, store, settled
        self._journal: Journal | None = None
        self._tail: list[pb.RunEvent] = []
        self._sequence = self._written = self._visible = sequence
        self._begun_step = 0
        self._life, self._unwritten, self._noted = Life.OPEN, False, True
        # Readers wait for the last one alone; the others are held over the disk and `publish`.
        self._appending, self._telling = threading.Lock(), threading.Lock()
        self._lock = threading.Lock()
        self._wakers: dict[int, Callable[[], None]] = {}

    @property
    def sequence(self) -> int:
        """Of the last event. Any thread."""
        return self._sequence

    @property
    def life(self) -> Life:
        """How far it is. Any thread."""
        return self._life

    @property
    def ended(self) -> bool:
        """Whether the last event is `finished`. Any thread."""
        with self._lock:
            return bool(self._tail) and self._tail[-1].HasField("finished")

    @property
    def kept_on_disk(self) -> bool:
        """Whether every event is on disk. Any thread."""
        return self._written == self._sequence

    def append(self, **kind: Any) -> bool:
        """Adds one event; the keyword is the field of RunEvent's oneof.

        Returns whether it was taken: after the end it is dropped, and the server's log says so.
        Any thread but an event loop's.
        """
        with self._appending:
            if self._life is not Life.OPEN:
                log.warning("run %s has ended; too late: %s", self.run_id, ", ".join(kind))
                return False
            event = pb.RunEvent(
                run_id=self.run_id, sequence=self._sequence + 1, event_time=now(), **kind
            )
            self._note(lambda journal: journal.event(event, self._written))
            with self._lock:
                self._tail.append(event)
                self._sequence = event.sequence
                if event.HasField("finished"):
                    self._life = Life.ENDED
            if self._store:
                self._store.append(self, event)
        if not self._store:
            self.committed(event.sequence)
        elif self._unwritten:
            self._show(event.sequence)
        return True

    def begin_with(self, queued: pb.RunEvent) -> None:
        """The first event, which whoever accepts the run writes; `committed` shows it.

        Before any other thread knows the log.
        """
        self._sequence = queued.sequence
        self._tail.append(queued)

    def open_journal(self, folder: Path) -> None:
        """From now on a kill takes no event; without room for a journal it may. Training thread."""
        with self._appending:
            try:
                self._journal = Journal(folder, self.run_id)
            except OSError as error:
                log.error("run %s has no journal: %s", self.run_id, error)

    def begin_step(self, step: int) -> None:
        """Before a step's first write to the weights; once more for the same step is nothing.

        Training thread.
        """
        with self._appending:
            if self._life is Life.OPEN and step > self._begun_step:
                self._begun_step = step
                self._note(lambda journal: journal.begin(step))

    def _note(self, write: Callable[[Journal], None]) -> None:
        try:
            if self._journal:
                write(self._journal)
            self._noted = True
        except OSError as error:
            # The ledger, on the same disk, says so in an event. Each step's would fill the log.
            if self._noted:
                log.error("the journal of run %s is not written: %s", self.run_id, error)
            self._noted = False

    # --- the ledger's side ------------------------------------------------------------------

    def committed(self, sequence: int) -> None:
        """Everything up to this sequence is on disk: readers are told. The ledger's thread."""
        with self._lock:
            self._written = max(self._written, sequence)
            if self.kept_on_disk:
                self._unwritten = False
        self._show(sequence)
        with self._lock:
            is_told = self._visible == self._written == self._sequence
            settles = self._life is Life.ENDED and is_told
            if settles:
                self._life = Life.CLOSED
        if settles:
            self._end_journal(Journal.remove)
            self._settled()

    def not_written(self, error: str) -> None:
        """The disk refuses: the run goes on, and readers are told from memory.

        The ledger's thread.
        """
        with self._lock:
            told, self._unwritten = self._unwritten, True
        if not told and self._life is Life.OPEN:
            message = (
                f"The ledger cannot be written ({error}); the run goes on, and its events are kept "
                "in memory and written as soon as there is room. New runs are refused until then."
            )
            self.append(warning=pb.Warning(reason="LEDGER_NOT_WRITTEN", message=message))
        self._show(self._sequence)

    def _show(self, sequence: int) -> None:
        # Two threads may show; the board must hear of events in order.
        with self._telling:
            with self._lock:
                shown = self._in_memory(self._visible, sequence)
                self._visible = max(self._visible, sequence)
                self._forget()
            for event in shown:
                self._publish(event)
        self._wake()

    def _in_memory(self, after: int, last: int) -> list[pb.RunEvent]:
        """Those of the events after one sequence up to another that are in memory."""
        before_tail = self._sequence - len(self._tail)
        return self._tail[max(0, after - before_tail) : max(0, last - before_tail)]

    def _forget(self) -> None:
        """Lets go of old events that are on disk, many at a time."""
        if self._store and len(self._tail) > 2 * TAIL:
            kept = max(TAIL, self._sequence - min(self._written, self._visible))
            del self._tail[: len(self._tail) - kept]

    def close(self) -> None:
        """Ends every reader who has read all; what is not in the ledger is left to the next start.

        Any thread but an event loop's, once the ledger's has ended.
        """
        with self._appending:
            self._life = Life.CLOSED
        self._end_journal(Journal.close)
        self._wake()

    def _end_journal(self, end: Callable[[Journal], None]) -> None:
        """Once: what is appended later could hit another file, with the descriptor's number."""
        with self._appending:
            journal, self._journal = self._journal, None
        try:
            if journal:
                end(journal)
        except OSError as error:
            log.error("the journal of run %s was not ended: %s", self.run_id, error)

    # --- readers ----------------------------------------------------------------------------

    async def follow(self, after_sequence: int = 0) -> AsyncIterator[pb.RunEvent]:
        """Every event after the given sequence, as they happen, until the run has finished.

        Raises Unavailable when the server stops before the run has finished, OutOfRange where
        the events were pruned. Any event loop.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        key = id(changed)

        def wake() -> None:
            # The reader's loop may end before the run does; nobody is left to be told then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._wakers[key] = wake
        try:
            position = after_sequence
            while True:
                changed.clear()
                async for event in self._between(position, self._visible):
                    position = event.sequence
                    yield event
                    if event.HasField("finished"):
                        return
                if self.ended and position >= self._sequence:
                    require_reached(self._sequence, position)
                    return
                if self._life is Life.CLOSED and position >= self._visible:
                    raise stopping()
                # A follower may ask for what comes after events that have not happened yet.
                if position >= self._visible:
                    await changed.wait()
        finally:
            with self._lock:
                self._wakers.pop(key, None)

    def _wake(self) -> None:
        with self._lock:
            wakers = list(self._wakers.values())
        for wake in wakers:
            wake()

    async def _between(self, after: int, last: int) -> AsyncIterator[pb.RunEvent]:
        """Visible events, from disk as far as they are no longer in memory."""
        while after < last:
            with self._lock:
                found = self._in_memory(after, last)
            if not found or found[0].sequence > after + 1:
                page = self._store.events if self._store else _nothing
                found = await asyncio.to_thread(page, self.run_id, after, PAGE)
                require_next(found, after)
            for event in found:
                if event.sequence > last:
                    return
                after = event.sequence
                yield event


def require_next(events: Iterable[pb.RunEvent], after: int) -> None:
    """Raises OutOfRange unless the first event is the one after a sequence."""
    first = next(iter(events), None)
    if first is None or first.sequence != after + 1:
        raise OutOfRange(
            f"The events after sequence {after} were pruned; "
            + (f"the first one kept is {first.sequence}." if first else "none is kept."),
            reason="EVENTS_PRUNED",
            metadata={"first_kept": str(first.sequence)} if first else {},
        )


def require_reached(last: int, after: int) -> None:
    """Raises OutOfRange where a run ended before the sequence that is asked for."""
    if after > last:
        raise OutOfRange(
            f"The run ended with sequence {last}; there is none after {after}.",
            reason="BEYOND_THE_END",
            metadata={"last_sequence": str(last)},
        )


def stopping() -> Unavailable:
    """What a reader, or whoever submits, is told while the server stops."""
    return Unavailable(
        "The server is stopping; runs that wait are kept, and begin when it is started again.",
        reason="SERVER_STOPPING",
    )


def _nothing(run_id: str, after: int, limit: int) -> list[pb.RunEvent]:
    return []
