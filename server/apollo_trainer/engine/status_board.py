"""How the training server is, kept up to date by whoever knows, and what is news of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from apollo_grpc.times import duration
from apollo_grpc.v1 import status_pb2 as pb
from apollo_grpc.v1 import training_pb2

# Events that wait for a listener; nobody is told more of them at once.
KEPT_EVENTS = 4096


class Listener(Protocol):
    """Called from any thread, the training thread among them: it must not wait."""

    def event_came(self) -> None:
        """`take_events` has one more."""

    def status_changed(self) -> None:
        """`take_status` has another one."""


class StatusBoard:
    """The status, and news for one listener. Every method may be called from any thread.

    Whoever changes the status or publishes an event leaves a mark and goes on: what watchers get
    of it is the listener's to make.

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
        self._events: deque[training_pb2.RunEvent] = deque(maxlen=KEPT_EVENTS)
        self._published = 0
        self._changed = True
        self._listener: Listener | None = None

    def snapshot(self) -> pb.ServerStatus:
        """The status now."""
        copy = pb.ServerStatus()
        with self._lock:
            copy.CopyFrom(self._status)
        copy.uptime.CopyFrom(duration(time.monotonic() - self._began))
        return copy

    def update(
        self, change: Callable[[pb.ServerStatus], None] | None = None, **fields: Any
    ) -> None:
        """Changes the status."""
        with self._lock:
            for name, value in fields.items():
                setattr(self._status, name, value)
            if change:
                change(self._status)
            self._changed, listener = True, self._listener
        if listener:
            listener.status_changed()

    def publish(self, event: training_pb2.RunEvent) -> None:
        """Keeps an event of a run for the listener, if there is one; it stays as it is now."""
        with self._lock:
            if (listener := self._listener) is None:
                return
            self._events.append(event)
            self._published += 1
        listener.event_came()

    # --- the listener's side ----------------------------------------------------------------

    def listen(self, listener: Listener | None) -> None:
        """From now on it is told of news; with None nobody is."""
        with self._lock:
            self._listener = listener
            self._events.clear()
            self._published = 0

    def take_events(self) -> tuple[list[training_pb2.RunEvent], int]:
        """Events since this was called last, and how many came before these and were not kept."""
        with self._lock:
            events, missed = list(self._events), self._published - len(self._events)
            self._events.clear()
            self._published = 0
        return events, missed

    def take_status(self) -> pb.ServerStatus | None:
        """The status, if it was changed since this was called last."""
        with self._lock:
            changed, self._changed = self._changed, False
        return self.snapshot() if changed else None
