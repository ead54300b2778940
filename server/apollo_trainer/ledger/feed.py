"""The events of all runs in the order in which they reached the disk, for any number of readers.

Each event on the disk has a revision, which rises and is never given twice. Readers at the end
share what is in memory; one that is behind reads pages from the disk, and holds one at most.
"""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_right
from collections.abc import AsyncIterator

from apollo_grpc.errors import OutOfRange
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.following import PAGE, Readers, stopping
from apollo_trainer.ledger.ledger import PAGE_BYTES, Ledger

# Of what is in memory for readers at the end.
KEPT_EVENTS, KEPT_BYTES = 1024, 16 * PAGE_BYTES
# Events that one of them takes at once, and holds where it does not read.
TAKEN = 16
Page = list[tuple[int, bytes]]


class Feed:
    """Every event that is on the disk, as serialized WatchRunsResponses.

    Attributes:
        newest: the last revision that was given; any thread reads it.
        readers: woken when there is more to see.
    """

    def __init__(self, ledger: Ledger):
        self._ledger, self.readers = ledger, Readers()
        self.newest = self._before = ledger.newest_revision()
        # What was committed after `_before`.
        self._recent: Page = []
        self._lock = threading.Lock()
        self._closed = False

    # --- the ledger's side, on its thread ---------------------------------------------------

    def grown(self) -> None:
        """Shows what was committed since the last call. Raises DataLoss as `Ledger`."""
        newest, end = self._ledger.newest_revision(), self.newest
        if newest == end:
            return
        while self.readers and (page := self._on_disk(end)):
            end = page[-1][0]
            self._keep(page)
        with self._lock:
            self.newest = newest
        if not self.readers:
            self.forget()
        self.readers.wake()

    def _keep(self, page: Page) -> None:
        with self._lock:
            self._recent += page
            size, kept = sum(len(data) for _, data in self._recent), 0
            while len(self._recent) - kept > KEPT_EVENTS or size > KEPT_BYTES:
                size -= len(self._recent[kept][1])
                kept += 1
            if kept:
                self._before = self._recent[kept - 1][0]
                del self._recent[:kept]

    def forget(self) -> None:
        """Keeps nothing in memory, as nobody reads, or something was deleted."""
        with self._lock:
            self._recent, self._before = [], self.newest

    def close(self) -> None:
        """Ends every reader that has read all. Any thread but an event loop's."""
        self._closed = True
        self.readers.wake()

    # --- the readers' side ------------------------------------------------------------------

    async def follow(self, after: int | None) -> AsyncIterator[bytes]:
        """Yields what is after a revision, without an end; None is that of now, 0 is all.

        Where nothing is at first, a message tells the revision of now. Raises OutOfRange where
        something after it was pruned, or it was not given yet; Unavailable when the server stops.
        Any event loop.
        """
        self._require_given(after or 0)
        with self.readers.joined() as changed:
            position, lost, told = self.newest if after is None else after, 0, False
            if position == 0:
                # Whoever asks for what is kept misses nothing of the rest.
                lost = await asyncio.to_thread(self._ledger.pruned_revision)
            while True:
                changed.clear()
                newest, page = self.newest, self._in_memory(position)
                if page is None:
                    page = await asyncio.to_thread(self._kept, position, max(position, lost))
                for revision, data in page:
                    position, told = revision, True
                    yield data
                if page:
                    continue
                # Those between were deleted.
                position = max(position, newest)
                if not told:
                    told = True
                    yield pb.WatchRunsResponse(revision=position).SerializeToString()
                if position < self.newest:
                    continue
                if self._closed:
                    raise stopping()
                await changed.wait()

    def _require_given(self, after: int) -> None:
        if after > self.newest:
            raise OutOfRange(
                f"The last event has revision {self.newest}; there is none after {after} yet. "
                "Another server may have given it: ask again without a revision, or with 0.",
                reason="BEYOND_THE_END",
                metadata={"newest_revision": str(self.newest)},
            )

    def _in_memory(self, after: int) -> Page | None:
        """The next ones after a revision; None where they may be on the disk alone."""
        with self._lock:
            if after < self._before:
                return None
            first = bisect_right(self._recent, after, key=lambda each: each[0])
            return self._recent[first : first + TAKEN]

    def _kept(self, after: int, whole_after: int) -> Page:
        """The same from the disk. Raises OutOfRange where some after a revision were pruned."""
        page, pruned = self._on_disk(after), self._ledger.pruned_revision()
        if pruned > whole_after:
            raise OutOfRange(
                f"Events after revision {after} were pruned; from {pruned + 1} on all are kept. "
                "Ask for those after the one before it, or with 0 for all that are kept.",
                reason="EVENTS_PRUNED",
                metadata={"first_revision": str(pruned + 1)},
            )
        return page

    def _on_disk(self, after: int) -> Page:
        return [
            (revision, _message(revision, event))
            for revision, event in self._ledger.revised(after, PAGE)
        ]


def _message(revision: int, event: bytes) -> bytes:
    read = pb.RunEvent.FromString(event)
    return pb.WatchRunsResponse(revision=revision, event=read).SerializeToString()
