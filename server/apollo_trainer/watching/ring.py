"""The newest updates as bytes: each is serialized once, on the event loop, for all watchers.

A watcher is a position in the ring and holds nothing: one that does not read costs no memory. What
the ring has dropped before it was read is lost to the watcher, and counted.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from apollo_grpc.v1 import status_pb2 as pb
from apollo_trainer.engine import KEPT_EVENTS, StatusBoard

MAX_BYTES = 16 * 2**20
# Between two statuses: one that changes with every step is not told with every step. And for each
# watcher, as telling one takes some 65 us: statuses are to take a seventieth of a core at most.
STATUS_SECONDS, SECONDS_A_WATCHER = 0.05, 0.005
# The pause between two watchers that are woken, in which the training thread has the interpreter:
# it asks for it after each operation, and a thousand in a row would keep it waiting for as long.
# Shorter ones are one, to the event loop. And how long all of them may take.
PAUSE_SECONDS, ROUND_SECONDS = 0.001, 1.0


@dataclass(frozen=True, slots=True)
class Update:
    """A serialized WatchStatusResponse, and the run whose event it holds; None for a status."""

    run_id: str | None
    data: bytes


class Ring:
    """A ring of updates, of the event loop on which it is made; listens while anybody watches.

    Attributes:
        end: number of the next update.
        lost: updates that watchers did not get because they were slow, of all of them together.
    """

    def __init__(self, board: StatusBoard):
        self._board, self._loop = board, asyncio.get_running_loop()
        self._updates: deque[Update] = deque()
        self._bytes = self._watchers = 0
        self._roused = self._resting = False
        self._told = b""
        self._waiting = dict[asyncio.Future[None], None]()
        self._due = deque[asyncio.Future[None]]()
        self._at_once = 1
        self.end, self.lost, self.closed = 0, 0, False

    @property
    def watchers(self) -> int:
        """How many watch. Any thread."""
        return self._watchers

    @property
    def first(self) -> int:
        """The number of the oldest update that is kept."""
        return self.end - len(self._updates)

    def at(self, number: int) -> Update:
        """Returns an update that is kept, by its number."""
        return self._updates[number - self.first]

    # --- the board's side, on any thread ----------------------------------------------------

    def event_came(self) -> None:
        """Wakes the loop, once for all events that come before it looks."""
        if not self._roused:
            self._roused = True
            # Nobody is left to be told where the loop has ended.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._look)

    def status_changed(self) -> None:
        """Wakes the loop, unless it looks by itself soon."""
        if not self._resting:
            self.event_came()

    # --- on the event loop ------------------------------------------------------------------

    def _look(self, *, at_once: bool = False) -> None:
        """Takes the news in: events, and then the status, unless one was told just now."""
        self._roused, before = False, self.end
        events, missed = self._board.take_events()
        if missed:
            # More than the ring holds came since: all that it held is older than what is missing.
            self._updates.clear()
            self._bytes, self.end = 0, self.end + missed
        for event in events:
            data = pb.WatchStatusResponse(event=event).SerializeToString()
            self._append(Update(event.run_id, data))
        if at_once or not self._resting:
            self._look_at_status()
        if self.end != before:
            self._tell()

    def _look_at_status(self) -> None:
        status = self._board.take_status()
        if status is None:
            return
        if not self._resting:
            self._resting = True
            rest = max(STATUS_SECONDS, self._watchers * SECONDS_A_WATCHER)
            self._loop.call_later(rest, self._rested)
        data = pb.WatchStatusResponse(status=status).SerializeToString()
        if (said := _said(status)) != self._told:
            self._told = said
            self._append(Update(None, data))

    def _rested(self) -> None:
        # In this order: a change that comes in between is looked at, or wakes the loop itself.
        self._resting = False
        if self._watchers:
            self._look()

    def _append(self, update: Update) -> None:
        self._updates.append(update)
        self.end += 1
        self._bytes += len(update.data)
        while len(self._updates) > KEPT_EVENTS or (
            self._bytes > MAX_BYTES and len(self._updates) > 1
        ):
            self._bytes -= len(self._updates.popleft().data)

    def _tell(self) -> None:
        waking = bool(self._due)
        self._due += self._waiting
        self._waiting.clear()
        self._at_once = math.ceil(len(self._due) * PAUSE_SECONDS / ROUND_SECONDS)
        if not waking:
            self._wake()

    def _wake(self) -> None:
        """Wakes the next of those that are due."""
        for _ in range(min(self._at_once, len(self._due))):
            watcher = self._due.popleft()
            if not watcher.done():
                watcher.set_result(None)
        if self._due:
            self._loop.call_later(PAUSE_SECONDS, self._wake)

    # --- watchers ---------------------------------------------------------------------------

    def subscribe(self) -> Watcher:
        """Adds a watcher; its first update is the status now, older changes may follow."""
        if not self._watchers:
            self._board.listen(self)
        self._watchers += 1
        self._look()
        status = pb.WatchStatusResponse(status=self._board.snapshot())
        return Watcher(self, Update(None, status.SerializeToString()))

    async def grown(self) -> None:
        """Waits until there are more updates, or none comes any more."""
        more = self._loop.create_future()
        self._waiting[more] = None
        try:
            await more
        finally:
            self._waiting.pop(more, None)

    def unsubscribe(self) -> None:
        """Removes a watcher; stops listening with the last one."""
        self._watchers -= 1
        if not self._watchers:
            self._board.listen(None)

    def close(self) -> None:
        """Ends every watcher once it has read all, the last status included."""
        self._look(at_once=True)
        self.closed = True
        self._tell()


class Watcher:
    """A position in the ring, for one task of its event loop.

    Attributes:
        lost: updates that the ring dropped before they were taken; whoever tells of them sets it
            to 0.
    """

    def __init__(self, ring: Ring, status: Update):
        self._ring, self._next, self.lost = ring, ring.end, 0
        self._status: Update | None = status

    @property
    def ended(self) -> bool:
        """Whether every update was taken and none comes any more."""
        return self._ring.closed and not self._status and self._next == self._ring.end

    def take(self) -> Update | None:
        """Takes the next update; None where there is none yet."""
        if status := self._status:
            self._status = None
            return status
        behind = max(0, self._ring.first - self._next)
        self._ring.lost += behind
        self.lost, self._next = self.lost + behind, self._next + behind
        if self._next == self._ring.end:
            return None
        self._next += 1
        return self._ring.at(self._next - 1)

    async def wait(self, seconds: float) -> None:
        """Waits until there is an update to take, none comes any more, or the time is over."""
        if self._next < self._ring.end or self._ring.closed:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ring.grown()


def _said(status: pb.ServerStatus) -> bytes:
    """Serializes a status without its uptime, to see whether it is another one."""
    status.ClearField("uptime")
    return status.SerializeToString(deterministic=True)
