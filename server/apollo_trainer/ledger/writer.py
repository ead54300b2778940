"""The thread that writes the ledger: it commits what waits together, then reports it.

Whoever appends never waits for the disk. A commit begins at once, or soon after the one before it:
an event is on disk within a tenth of a second, while steps of a millisecond share commits.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.entries import Acceptance, Deletion, write_events
from apollo_trainer.ledger.events import EventLog
from apollo_trainer.ledger.feed import Feed
from apollo_trainer.ledger.file import LedgerFile, transaction
from apollo_trainer.ledger.following import stopping
from apollo_trainer.ledger.ledger import Ledger
from apollo_trainer.ledger.operations import OperationChange
from apollo_trainer.ledger.retention import Retention

log = logging.getLogger(__name__)
COMMIT_SECONDS = 0.02
RETRY_SECONDS = 0.5
RETENTION_SECONDS = 10.0


@dataclass(frozen=True)
class _Event:
    sink: EventLog
    event: pb.RunEvent


Change = Acceptance | Deletion
Entry = _Event | Change | OperationChange


class LedgerWriter:
    """Writes the ledger on a thread of its own until `stop`; it is the `Store` of event logs.

    Attributes:
        events: reads written events, as `Ledger.events`.
        took: called with the seconds of each commit, on the ledger's thread.
        feed: shows those of all runs.
    """

    def __init__(self, file: LedgerFile, ledger: Ledger, retention: Retention):
        self._file, self._retention, self.events = file, retention, ledger.events
        self.took: Callable[[float], None] = lambda seconds: None
        self.feed = Feed(ledger)
        self._waiting: deque[Entry] = deque()
        # Held over nothing: whoever appends must not wait for the disk.
        self._changed = threading.Condition()
        self._stopped = self._ended = False
        self._retained_at, self._more_to_remove = time.monotonic(), False
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._thread.start()

    def change(self, change: Change) -> Future[str]:
        """Writes a new run, or deletes one; the future holds its id once that is on disk.

        Or FailedPrecondition where the disk refuses, Unavailable when the server stops. Nobody can
        cancel it. Any thread.
        """
        change.done.set_running_or_notify_cancel()
        if not self._put(change):
            change.done.set_exception(stopping())
        return change.done

    def append(self, sink: EventLog, event: pb.RunEvent) -> None:
        """Queues an event; its log's events must come in order. Any thread.

        Calls `sink.committed` or `sink.not_written` on the ledger's thread.
        """
        self._put(_Event(sink, event))

    def keep(self, change: OperationChange) -> None:
        """Queues a change of an operation; changes of one must come in order. Any thread."""
        if not self._put(change):
            change.told(stopping())

    def _put(self, entry: Entry) -> bool:
        with self._changed:
            if not self._ended:
                self._waiting.append(entry)
                self._changed.notify()
            return not self._ended

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            began, is_last = time.monotonic(), self._stopped
            if error := self._commit(batch):
                self._keep(batch, error)
                if is_last:
                    break
                self._pause(RETRY_SECONDS)
                continue
            if wrote := bool(batch):
                self.took(time.monotonic() - began)
            self._tell(batch)
            # Otherwise the specs of the last runs stay in memory until the next one comes.
            batch.clear()
            self._retain()
            if wrote:
                self._pause(COMMIT_SECONDS - (time.monotonic() - began))
        with self._changed:
            self._ended, late = True, list(self._waiting)
        for entry in late:
            if isinstance(entry, Change):
                entry.done.set_exception(stopping())
            elif isinstance(entry, OperationChange):
                _guarded(entry.told, stopping())

    def _next_batch(self) -> list[Entry] | None:
        """All that waits, once anything does or old events are due; None at the end."""
        with self._changed:
            if not self._waiting and not self._stopped:
                self._changed.wait(COMMIT_SECONDS if self._more_to_remove else RETENTION_SECONDS)
            batch = list(self._waiting)
            self._waiting.clear()
            return None if self._stopped and not batch else batch

    def _pause(self, seconds: float) -> None:
        """Lets events gather; whoever waits for an answer is not held up, nor is the end."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._stopped and (left := deadline - time.monotonic()) > 0:
                if any(not _is_patient(entry) for entry in self._waiting):
                    return
                self._changed.wait(left)

    def _commit(self, batch: list[Entry]) -> Exception | None:
        """Returns the error of the disk, or of a mistake of the server's; None where it worked."""
        if not batch:
            return None
        try:
            with transaction(self._file.writer):
                for entry in batch:
                    if not isinstance(entry, _Event):
                        entry.write(self._file.writer)
                events = [entry.event for entry in batch if isinstance(entry, _Event)]
                write_events(self._file.writer, events)
        except Exception as error:
            # The thread that writes for every run must not end for one.
            known = isinstance(error, sqlite3.Error)
            log.error("the ledger was not written: %s", error, exc_info=not known)
            return error
        return None

    def _tell(self, batch: list[Entry]) -> None:
        committed: dict[EventLog, int] = {}
        if any(isinstance(entry, Deletion) for entry in batch):
            _guarded(self._erase)
        if batch:
            # Whoever is told of one finds it in the feed.
            _guarded(self.feed.grown)
        for entry in batch:
            if isinstance(entry, Change):
                entry.done.set_result(entry.run_id)
            elif isinstance(entry, OperationChange):
                _guarded(entry.told, None)
            else:
                committed[entry.sink] = entry.event.sequence
        for sink, sequence in committed.items():
            _guarded(sink.committed, sequence)

    def _erase(self) -> None:
        """Takes what was deleted out of memory, and out of the write-ahead log."""
        self.feed.forget()
        busy, *_ = self._file.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            log.warning("what was deleted is in the ledger's log until the server has stopped")

    def _keep(self, batch: list[Entry], error: Exception) -> None:
        """Refuses what is waited for; tries the rest again, before what came meanwhile."""
        events = [entry for entry in batch if isinstance(entry, _Event)]
        with self._changed:
            self._waiting.extendleft(entry for entry in reversed(batch) if _is_patient(entry))
        for entry in batch:
            if isinstance(entry, Change):
                entry.done.set_exception(_refusal(error))
            elif isinstance(entry, OperationChange):
                _guarded(entry.told, _refusal(error))
        for sink in {entry.sink for entry in events}:
            _guarded(sink.not_written, str(error) or type(error).__name__)

    def _retain(self) -> None:
        now = time.monotonic()
        if not self._more_to_remove and now - self._retained_at < RETENTION_SECONDS:
            return
        self._retained_at = now
        try:
            self._more_to_remove = self._retention.apply(self._file.writer)
        except Exception as error:
            known = isinstance(error, sqlite3.Error)
            log.warning("no old events were removed from the ledger: %s", error, exc_info=not known)
            self._more_to_remove = False

    def stop(self) -> None:
        """Writes what waits, and ends; what the disk refuses is left to the journals.

        Any thread but an event loop's and its own.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        self.feed.close()
        self._file.close()


def _is_patient(entry: Entry) -> bool:
    """Whether it may wait for others, and is tried again where the disk refuses it."""
    return entry.again if isinstance(entry, OperationChange) else isinstance(entry, _Event)


def _guarded(tell: Callable[..., None], *what: object) -> None:
    try:
        tell(*what)
    except Exception:
        # The thread that writes for every run must not end for one.
        log.exception("a reader of the ledger failed")


def _refusal(error: Exception) -> FailedPrecondition:
    return FailedPrecondition(
        f"The ledger cannot be written ({error}); nothing was taken or deleted. Runs at work go "
        "on. Make room in the server's state folder, then ask again.",
        reason="LEDGER_NOT_WRITTEN",
    )
