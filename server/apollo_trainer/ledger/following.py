"""Readers of an event log: each gets every event at its own pace, on its own event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from apollo_grpc.errors import OutOfRange, Unavailable
from apollo_grpc.v1 import training_pb2 as pb

if TYPE_CHECKING:
    from apollo_trainer.ledger.events import EventLog

# Events that are read from disk at once.
PAGE = 512


class Readers:
    """The readers of one log that wait for more, each on its own event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def __len__(self) -> int:
        return len(self._changed)

    @contextmanager
    def joined(self) -> Iterator[asyncio.Event]:
        """While the block runs, `wake` sets the event. On the reader's event loop."""
        changed = asyncio.Event()
        with self._lock:
            self._changed[changed] = asyncio.get_running_loop()
        try:
            yield changed
        finally:
            with self._lock:
                self._changed.pop(changed, None)

    def wake(self) -> None:
        """Wakes every reader. Any thread."""
        loops = defaultdict[asyncio.AbstractEventLoop, list[asyncio.Event]](list)
        with self._lock:
            for changed, loop in self._changed.items():
                loops[loop].append(changed)
        # A loop is woken once for all of its readers, of whom there may be hundreds.
        for loop, readers in loops.items():
            # It may end before the run does; nobody is left to be told then.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_set_all, readers)


def _set_all(changed: Iterable[asyncio.Event]) -> None:
    for each in changed:
        each.set()


async def follow(log: EventLog, after: int) -> AsyncIterator[pb.RunEvent]:
    """Yields the events after a sequence as they are shown, until the run has finished.

    Raises Unavailable when the server stops before that, OutOfRange where the events were pruned
    or the run ended before that sequence. Any event loop.
    """
    with log.readers.joined() as changed:
        while True:
            changed.clear()
            async for event in _between(log, after, log.visible):
                after = event.sequence
                yield event
                if event.HasField("finished"):
                    return
            if log.ended and after >= log.sequence:
                require_reached(log.sequence, after)
                return
            if log.closed and after >= log.visible:
                raise stopping()
            # A reader may ask for what comes after events that have not happened yet.
            if after >= log.visible:
                await changed.wait()


async def _between(log: EventLog, after: int, last: int) -> AsyncIterator[pb.RunEvent]:
    """The events after one sequence up to another: from memory, the older ones from disk."""
    while after < last:
        found = log.in_memory(after, last)
        if not found or found[0].sequence > after + 1:
            found = await asyncio.to_thread(log.on_disk, after, PAGE)
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
    """The error for readers and submitters while the server stops."""
    return Unavailable(
        "The server is stopping; runs that wait are kept, and begin when it is started again.",
        reason="SERVER_STOPPING",
    )
