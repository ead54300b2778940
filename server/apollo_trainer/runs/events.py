"""The events of a run: kept in order, without gaps, and followed by any number of readers.

A reader sees an event once it is on disk: what was seen is there after a crash, too, under the
same number.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from google.protobuf import duration_pb2, timestamp_pb2

from apollo_grpc.errors import OutOfRange, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.runs.journal import Journal

log = logging.getLogger(__name__)
# Events of a run at work that are kept in memory for its readers; older ones are read from disk.
TAIL = 1024
PAGE = 512


def now() -> timestamp_pb2.Timestamp:
    """The time as protobuf writes it."""
    stamp = timestamp_pb2.Timestamp()
    stamp.GetCurrentTime()
    return stamp


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as protobuf writes them."""
    made = duration_pb2.Duration()
    made.FromNanoseconds(int(seconds * 1e9))
    return made


class Store(Protocol):
    """Where events go, and where those that are no longer in memory come from."""

    def append(self, sink: EventLog, event: pb.RunEvent) -> None:
        """Has an event written, without waiting; the log is told when it is."""

    def events(self, run_id: str, after: int, limit: int) -> list[pb.RunEvent]:
        """The next written events after a sequence."""


class EventLog:
    """One run's events. Appended by the training thread, followed from an event loop.

    Appending never waits, neither for a reader nor for the disk.

    Args:
        run_id: of the run.
        publish: is told every event when its readers are.
        store: keeps the events; without one they are in memory alone.
        sequence: of the last event that the store has already.
        settled: is told once the run has finished and all of it is on disk.
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
        self.journal: Journal | None = None
        self._publish, self._store, self._settled = publish, store, settled
        self._tail: list[pb.RunEvent] = []
        self._sequence = self._written = self._visible = sequence
        self._begun_step = 0
        self._finished = self._closed = self._unwritten = False
        self._lock, self._telling = threading.Lock(), threading.Lock()
        self._wakers: dict[int, Callable[[], None]] = {}

    @property
    def sequence(self) -> int:
        """Of the last event."""
        return self._sequence

    @property
    def ended(self) -> bool:
        """Whether the last event is `finished`."""
        return self._finished

    @property
    def kept_on_disk(self) -> bool:
        """Whether every event is on disk."""
        return self._written == self._sequence

    def append(self, **kind: Any) -> pb.RunEvent:
        """Adds one event; the keyword is the field of RunEvent's oneof."""
        with self._lock:
            self._sequence += 1
            event = pb.RunEvent(
                run_id=self.run_id, sequence=self._sequence, event_time=now(), **kind
            )
            self._tail.append(event)
            self._finished = event.HasField("finished")
            self._note(event)
            if self._store:
                self._store.append(self, event)
        if not self._store:
            self.committed(event.sequence)
        elif self._unwritten:
            self._show(event.sequence)
        return event

    def begin_with(self, queued: pb.RunEvent) -> None:
        """The first event, which whoever accepts the run writes; `committed` shows it."""
        self._sequence = queued.sequence
        self._tail.append(queued)

    def open_journal(self, folder: Path) -> None:
        """From now on a kill takes no event; without room for a journal it may."""
        try:
            self.journal = Journal(folder, self.run_id)
        except OSError as error:
            log.error("run %s has no journal: %s", self.run_id, error)

    def begin_step(self, step: int) -> None:
        """Before a step's first write to the weights; once more for the same step is nothing."""
        if step > self._begun_step:
            self._begun_step = step
            if self.journal:
                try:
                    self.journal.begin(step)
                except OSError as error:
                    log.error("the journal was not written: %s", error)

    def _note(self, event: pb.RunEvent) -> None:
        if not self.journal:
            return
        try:
            self.journal.event(event.SerializeToString())
        except OSError as error:
            # The ledger, on the same disk, says so in an event.
            log.error("the journal was not written: %s", error)

    # --- the ledger's side ------------------------------------------------------------------

    def committed(self, sequence: int) -> None:
        """Everything up to this sequence is on disk: readers are told."""
        with self._lock:
            self._written = max(self._written, sequence)
            if self.kept_on_disk:
                self._unwritten = False
            is_settled = self._finished and self.kept_on_disk
        self._show(sequence)
        if is_settled:
            if self.journal:
                self.journal.remove()
            self._settled()

    def not_written(self, error: str) -> None:
        """The disk refuses: the run goes on, and readers are told from memory."""
        with self._lock:
            told, self._unwritten = self._unwritten, True
        if not told and not self._finished:
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
                wakers = list(self._wakers.values())
            for event in shown:
                self._publish(event)
        for wake in wakers:
            wake()

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
        """Ends every reader who has read all; the run itself goes on, or is kept."""
        with self._lock:
            self._closed = True
            wakers = list(self._wakers.values())
        for wake in wakers:
            wake()

    # --- readers ----------------------------------------------------------------------------

    async def follow(self, after_sequence: int = 0) -> AsyncIterator[pb.RunEvent]:
        """Every event after the given sequence, as they happen, until the run has finished.

        Raises Unavailable when the server stops before the run has finished, OutOfRange where
        the events were pruned.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        key = id(changed)

        def wake() -> None:
            # The reader's loop may end before the run does; nobody is left to be told then.
            if not loop.is_closed():
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
                if self._closed and position >= self._visible:
                    raise stopping()
                if self._finished and position >= self._sequence:
                    require_reached(self._sequence, position)
                    return
                # A follower may ask for what comes after events that have not happened yet.
                if position >= self._visible:
                    await changed.wait()
        finally:
            with self._lock:
                self._wakers.pop(key, None)

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
