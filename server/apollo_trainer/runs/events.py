"""The events of a run: kept in order, without gaps, and followed by any number of readers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2

from apollo_grpc.v1 import training_pb2 as pb


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


class EventLog:
    """One run's events. Appended by the training thread, followed from an event loop.

    Appending never waits for a reader: a reader takes events at its own pace from the list.

    Args:
        run_id: of the run.
        publish: is told every event as it happens.
    """

    def __init__(self, run_id: str, publish: Callable[[pb.RunEvent], None]):
        self.run_id = run_id
        self._publish = publish
        self._events: list[pb.RunEvent] = []
        self._lock = threading.Lock()
        self._wakers: dict[int, Callable[[], None]] = {}

    @property
    def ended(self) -> bool:
        """Whether the last event is `finished`."""
        return bool(self._events) and self._events[-1].HasField("finished")

    def append(self, **kind: Any) -> None:
        """Adds one event; the keyword is the field of RunEvent's oneof."""
        with self._lock:
            event = pb.RunEvent(
                run_id=self.run_id, sequence=len(self._events) + 1, event_time=now(), **kind
            )
            self._events.append(event)
            wakers = list(self._wakers.values())
        self._publish(event)
        for wake in wakers:
            wake()

    async def follow(self, after_sequence: int = 0) -> AsyncIterator[pb.RunEvent]:
        """Every event after the given sequence, as they happen, until the run has finished."""
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
                for event in self._events[position:]:
                    position = event.sequence
                    yield event
                    if event.HasField("finished"):
                        return
                # A follower may ask for what comes after events that have not happened yet.
                if position >= len(self._events):
                    await changed.wait()
        finally:
            with self._lock:
                self._wakers.pop(key, None)
