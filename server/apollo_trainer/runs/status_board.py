"""How the training server is, kept up to date by whoever knows, and told to subscribers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from apollo_grpc.v1 import status_pb2 as pb
from apollo_grpc.v1 import training_pb2
from apollo_trainer.runs.events import duration

SUBSCRIBER_QUEUE = 256


class Subscriber:
    """One watcher's bounded queue; the oldest updates are lost when it is slow, and counted."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._lock = threading.Lock()
        self._updates: deque[pb.WatchStatusResponse] = deque()
        self._dropped = 0
        self._closed = False
        self._arrived = asyncio.Event()

    def offer(self, update: pb.WatchStatusResponse) -> None:
        """Adds an update, from any thread, and never waits."""
        with self._lock:
            if len(self._updates) == SUBSCRIBER_QUEUE:
                self._updates.popleft()
                self._dropped += 1
            self._updates.append(update)
        self._wake()

    def close(self) -> None:
        """No update comes any more."""
        with self._lock:
            self._closed = True
        self._wake()

    def _wake(self) -> None:
        # Raises when the watcher's loop has ended; nobody is left to be told then.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.set)

    @property
    def ended(self) -> bool:
        """Whether every update was read and none comes any more."""
        with self._lock:
            return self._closed and not self._updates

    async def next(self, seconds: float) -> pb.WatchStatusResponse | None:
        """The next update with the number lost before it; None when none came in time."""
        deadline = self._loop.time() + seconds
        while True:
            with self._lock:
                if self._updates:
                    update = self._updates.popleft()
                    update.dropped, self._dropped = self._dropped, 0
                    return update
                if self._closed:
                    return None
                self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), deadline - self._loop.time())
            except TimeoutError:
                return None


class StatusBoard:
    """The status, and its subscribers.

    Args:
        version: of the training server.
        detail: why there is no engine yet, in words.
    """

    def __init__(self, version: str, detail: str):
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._status = pb.ServerStatus(
            server_version=version,
            attachment=pb.ATTACHMENT_STATE_DETACHED,
            attachment_detail=detail,
        )
        self._subscribers: set[Subscriber] = set()

    def snapshot(self) -> pb.ServerStatus:
        """The status now."""
        with self._lock:
            copy = pb.ServerStatus()
            copy.CopyFrom(self._status)
        copy.uptime.CopyFrom(duration(time.monotonic() - self._began))
        return copy

    def update(
        self, change: Callable[[pb.ServerStatus], None] | None = None, **fields: Any
    ) -> None:
        """Changes the status and tells the subscribers, if that made it another one."""
        with self._lock:
            before = self._status.SerializeToString(deterministic=True)
            for name, value in fields.items():
                setattr(self._status, name, value)
            if change:
                change(self._status)
            if self._status.SerializeToString(deterministic=True) == before:
                return
        self._tell(lambda: pb.WatchStatusResponse(status=self.snapshot()))

    def publish(self, event: training_pb2.RunEvent) -> None:
        """Tells the subscribers an event of a run."""
        self._tell(lambda: pb.WatchStatusResponse(event=event))

    def _tell(self, make: Callable[[], pb.WatchStatusResponse]) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            # A message each: `dropped` is the subscriber's own.
            subscriber.offer(make())

    def subscribe(self) -> Subscriber:
        """A subscriber on the running event loop, whose first update is the status now."""
        subscriber = Subscriber(asyncio.get_running_loop())
        with self._lock:
            self._subscribers.add(subscriber)
        subscriber.offer(pb.WatchStatusResponse(status=self.snapshot()))
        return subscriber

    def close(self) -> None:
        """Ends every subscription once its updates were read."""
        with self._lock:
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            subscriber.close()

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Ends a subscription."""
        with self._lock:
            self._subscribers.discard(subscriber)
