"""The event log of a run: its events in order, without gaps.

A reader sees an event once it is on disk: what was seen is there after a crash, too, under the
same number.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from apollo_grpc.times import now
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.following import Readers, follow
from apollo_trainer.ledger.journal import Journal

log = logging.getLogger(__name__)
# Events of a run at work that are kept in memory for its readers; older ones are read from disk.
TAIL = 1024


class Store(Protocol):
    """Keeps the events of a log on disk."""

    def append(self, sink: EventLog, event: pb.RunEvent) -> None:
        """Queues an event for writing; calls `sink.committed` or `sink.not_written` later."""

    def events(self, run_id: str, after: int, limit: int) -> list[pb.RunEvent]:
        """Reads the next events after a sequence from disk."""


class Life(Enum):
    """The state of a log. Its transitions, all of them:

    OPEN -> FINISHED    `append` of the event `finished`: later events are dropped.
    FINISHED -> CLOSED  `committed`, once every event is on disk and shown: the journal is removed.
    any -> CLOSED       `close`, when the server stops: the journal is kept for the next start.
    """

    OPEN = "takes events"
    FINISHED = "has `finished`, which is not on disk yet"
    CLOSED = "writes nothing any more"


class EventLog:
    """One run's events: appended by any thread but the event loops', followed from those.

    `append` may wait for the journal's write, but not for a reader nor for the ledger.

    Args:
        run_id: of the run.
        publish: called with each event once readers may see it, on the thread that shows it.
        store: keeps the events on disk; without one they are in memory alone.
        sequence: of the last event that the store has already.
        settled: called once the run has finished and all of it is on disk, on the ledger's thread.

    Attributes:
        life: the state; any thread reads it, and the next two.
        sequence: of the last event.
        visible: sequence of the last event that readers may see.
        readers: woken when there is more to see.
    """

    def __init__(
        self,
        run_id: str,
        publish: Callable[[pb.RunEvent], None],
        store: Store | None = None,
        sequence: int = 0,
        settled: Callable[[], None] = lambda: None,
    ):
        self.run_id, self.readers = run_id, Readers()
        self._publish, self._store, self._settled = publish, store, settled
        self._journal: Journal | None = None
        self.life = Life.OPEN
        self._tail: list[pb.RunEvent] = []
        self.sequence = self._written = self.visible = sequence
        # Whether the disk refuses now: the ledger, so that readers are shown what is in memory;
        # the journal, which is logged once.
        self._unwritten = self._journal_refused = False
        # Readers wait for the last one alone; the others are held over the disk and `publish`.
        self._appending, self._showing = threading.Lock(), threading.Lock()
        self._lock = threading.RLock()

    @property
    def ended(self) -> bool:
        """Whether the last event is `finished`. Any thread."""
        with self._lock:
            return bool(self._tail) and self._tail[-1].HasField("finished")

    @property
    def kept_on_disk(self) -> bool:
        """Whether every event is on disk. Any thread."""
        return self._written == self.sequence

    # --- the run's side ---------------------------------------------------------------------

    def append(self, **kind: Any) -> bool:
        """Adds one event; the keyword is the field of RunEvent's oneof.

        Returns whether it was taken: after the end it is dropped, which is logged. Any thread but
        an event loop's.
        """
        with self._appending:
            if self.life is not Life.OPEN:
                log.warning("run %s has ended; too late: %s", self.run_id, ", ".join(kind))
                return False
            event = pb.RunEvent(
                run_id=self.run_id, sequence=self.sequence + 1, event_time=now(), **kind
            )
            self._note(lambda journal: journal.event(event, self._written))
            with self._lock:
                self._tail.append(event)
                self.sequence = event.sequence
                if event.HasField("finished"):
                    self.life = Life.FINISHED
            if self._store:
                self._store.append(self, event)
        if not self._store:
            self.committed(event.sequence)
        elif self._unwritten:
            self._show(event.sequence)
        return True

    def begin_with(self, queued: pb.RunEvent) -> None:
        """Sets the first event, which is written with the run itself; `committed` shows it.

        Before any other thread knows the log.
        """
        self.sequence = queued.sequence
        self._tail.append(queued)

    def open_journal(self, folder: Path) -> None:
        """Opens the journal, so that a kill loses no event; failure is logged. Training thread."""
        with self._appending:
            try:
                self._journal = Journal(folder, self.run_id)
            except OSError as error:
                log.error("run %s has no journal: %s", self.run_id, error)

    def begin_step(self, step: int) -> None:
        """Notes in the journal that a step is about to write to the weights. Training thread."""
        with self._appending:
            if self.life is Life.OPEN:
                self._note(lambda journal: journal.begin(step))

    def _note(self, write: Callable[[Journal], None]) -> None:
        if self._journal is None:
            return
        try:
            write(self._journal)
            self._journal_refused = False
        except OSError as error:
            # The ledger, on the same disk, says so in an event. Each step's would fill the log.
            if not self._journal_refused:
                log.error("the journal of run %s is not written: %s", self.run_id, error)
            self._journal_refused = True

    def close(self) -> None:
        """Ends every reader that has read all; the journal is kept for the next start.

        Any thread but an event loop's, once the ledger's has ended.
        """
        with self._appending:
            self.life = Life.CLOSED
        self._end_journal(Journal.close)
        self.readers.wake()

    def _end_journal(self, end: Callable[[Journal], None]) -> None:
        """Once: what is appended later could hit another file, with the descriptor's number."""
        with self._appending:
            journal, self._journal = self._journal, None
        try:
            if journal:
                end(journal)
        except OSError as error:
            log.error("the journal of run %s was not ended: %s", self.run_id, error)

    # --- the ledger's side ------------------------------------------------------------------

    def committed(self, sequence: int) -> None:
        """Everything up to this sequence is on disk: shows it. The ledger's thread."""
        with self._lock:
            self._written = max(self._written, sequence)
            if self.kept_on_disk:
                self._unwritten = False
        self._show(sequence)
        with self._lock:
            all_shown = self.visible == self._written == self.sequence
            if settles := self.life is Life.FINISHED and all_shown:
                self.life = Life.CLOSED
        if settles:
            self._end_journal(Journal.remove)
            self._settled()

    def not_written(self, error: str) -> None:
        """The disk refuses: the run goes on, and readers are shown what is in memory.

        The ledger's thread.
        """
        with self._lock:
            told, self._unwritten = self._unwritten, True
        if not told and self.life is Life.OPEN:
            message = (
                f"The ledger cannot be written ({error}); the run goes on, and its events are kept "
                "in memory and written as soon as there is room. New runs are refused until then."
            )
            self.append(warning=pb.Notice(reason="LEDGER_NOT_WRITTEN", message=message))
        self._show(self.sequence)

    def _show(self, sequence: int) -> None:
        # Two threads may show; the board must hear of events in order.
        with self._showing:
            with self._lock:
                shown = self.in_memory(self.visible, sequence)
                self.visible = max(self.visible, sequence)
                self._forget()
            for event in shown:
                self._publish(event)
        self.readers.wake()

    def _forget(self) -> None:
        """Drops old events that are on disk, many at a time."""
        if self._store and len(self._tail) > 2 * TAIL:
            kept = max(TAIL, self.sequence - min(self._written, self.visible))
            del self._tail[: len(self._tail) - kept]

    # --- the readers' side ------------------------------------------------------------------

    def follow(self, after_sequence: int = 0) -> AsyncIterator[pb.RunEvent]:
        """Yields the events after a sequence, until the run has finished: see `follow`."""
        return follow(self, after_sequence)

    @property
    def open(self) -> bool:
        """Whether the run has not finished."""
        return self.life is Life.OPEN

    @property
    def closed(self) -> bool:
        """Whether nothing is written any more."""
        return self.life is Life.CLOSED

    def in_memory(self, after: int, last: int) -> list[pb.RunEvent]:
        """Those of the events after one sequence up to another that are still in memory."""
        with self._lock:
            before_tail = self.sequence - len(self._tail)
            return self._tail[max(0, after - before_tail) : max(0, last - before_tail)]

    def on_disk(self, after: int, limit: int) -> list[pb.RunEvent]:
        """Reads the next events after a sequence from disk."""
        return self._store.events(self.run_id, after, limit) if self._store else []
