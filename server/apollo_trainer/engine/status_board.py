"""The server's status as callers see it, and the news that watchers are sent.

The board owns nothing that it shows: weight version, optimizer and attachment are the session's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from apollo_grpc.times import duration
from apollo_grpc.v1 import status_pb2 as pb
from apollo_grpc.v1 import training_pb2
from apollo_trainer.engine.device_memory import device_memory

if TYPE_CHECKING:
    from apollo_trainer.engine.session import Session
    from apollo_trainer.weights.attach import MapReport

ATTACHED = "vLLM's live weights are mapped and verified."
# Events that wait for a listener; nobody is told more of them at once.
KEPT_EVENTS = 4096


class Listener(Protocol):
    """Called from any thread, the training thread among them: it must not wait."""

    def event_came(self) -> None:
        """`take_events` has one more."""

    def status_changed(self) -> None:
        """`take_status` has another one."""


class StatusBoard:
    """The status, and news for one listener. Any thread may call every method.

    Changing the status or publishing an event never waits: it leaves a mark, and the listener
    makes of it what watchers are sent.

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
        self._observers: tuple[Callable[[training_pb2.RunEvent], None], ...] = ()

    def snapshot(self) -> pb.ServerStatus:
        """Returns a copy of the status."""
        copy = pb.ServerStatus()
        with self._lock:
            copy.CopyFrom(self._status)
        copy.uptime.CopyFrom(duration(time.monotonic() - self._began))
        return copy

    def update(
        self, change: Callable[[pb.ServerStatus], None] | None = None, **fields: Any
    ) -> None:
        """Sets fields, then calls `change` with the status, which it may change further."""
        with self._lock:
            for name, value in fields.items():
                setattr(self._status, name, value)
            if change:
                change(self._status)
            self._changed, listener = True, self._listener
        if listener:
            listener.status_changed()

    def show(self, session: Session, **fields: Any) -> None:
        """Shows a session's optimizer and weight version, and sets other fields with it."""
        device = _device_memory(session)
        self.update(lambda status: _show(status, session, device), **fields)

    def show_version(self, session: Session, **fields: Any) -> None:
        """Shows a session's weight version, and sets other fields with it."""
        self.update(lambda status: _show_version(status, session), **fields)

    def show_attached(self, session: Session) -> None:
        """Shows a new session and its attachment."""
        attachment = session.attachment
        memory, device = pb.WeightMemory(**vars(attachment.memory())), _device_memory(session)

        def change(status: pb.ServerStatus) -> None:
            status.weight_memory.CopyFrom(memory)
            _show(status, session, device)

        self.update(
            change,
            attachment=pb.ATTACHMENT_STATE_ATTACHED,
            model=attachment.directory,
            engine_epoch=attachment.epoch,
            logprob_difference=attachment.logprob_difference,
        )

    def show_map(self, report: MapReport) -> None:
        """Shows what the trace of vLLM's loader found."""
        found = pb.WeightMap(
            architecture=report.architecture,
            parameters=report.parameters,
            views=report.views,
            derived=report.derived,
        )
        self.update(lambda status: status.weight_map.MergeFrom(found))

    def show_refused(self, tensors: Mapping[str, str]) -> None:
        """Shows each refused tensor and why."""
        refused = [pb.RefusedWeight(name=name, reason=why) for name, why in tensors.items()]
        self.update(lambda status: status.weight_map.refused.extend(refused))

    def observe(self, observer: Callable[[training_pb2.RunEvent], None]) -> None:
        """Adds one that is called with each event, which it may not change.

        It misses none, and is called by whoever publishes: it must neither wait nor raise, and
        takes some tens of microseconds at most.
        """
        with self._lock:
            self._observers = (*self._observers, observer)

    def publish(self, event: training_pb2.RunEvent) -> None:
        """Tells the observers, and keeps an event of a run for the listener, if there is one.

        Nobody may change it later.
        """
        for observer in self._observers:
            observer(event)
        with self._lock:
            if (listener := self._listener) is None:
                return
            self._events.append(event)
            self._published += 1
        listener.event_came()

    # --- the listener's side ----------------------------------------------------------------

    def listen(self, listener: Listener | None) -> None:
        """Sets the listener, which is called at news from now on; None for no listener."""
        with self._lock:
            self._listener = listener
            self._events.clear()
            self._published = 0

    def take_events(self) -> tuple[list[training_pb2.RunEvent], int]:
        """Returns the events since the last call, and how many older ones were not kept."""
        with self._lock:
            events, missed = list(self._events), self._published - len(self._events)
            self._events.clear()
            self._published = 0
        return events, missed

    def take_status(self) -> pb.ServerStatus | None:
        """Returns the status if it was changed since the last call."""
        with self._lock:
            changed, self._changed = self._changed, False
        return self.snapshot() if changed else None


def _device_memory(session: Session) -> pb.DeviceMemory:
    device = session.attachment.model.get_input_embeddings().weight.device
    name, used, total = device_memory(device)
    return pb.DeviceMemory(device=name, used_bytes=used, total_bytes=total)


def _show(status: pb.ServerStatus, session: Session, memory: pb.DeviceMemory) -> None:
    status.device_memory.CopyFrom(memory)
    refused = session.checkpoints.poison.refusal or session.other_weights
    if status.attachment == pb.ATTACHMENT_STATE_ATTACHED:
        passes, computed_by = session.passes, session.attachment.computed_by
        slow = " ".join(filter(None, (computed_by, passes.refusal))) if passes else ""
        found = (session.found, session.checkpoints.not_synced, session.refused_forms)
        device = (session.sharing, session.needs, slow)
        refusal = f"Runs are refused: {refused}" if refused else ""
        sentences = (ATTACHED, session.paused, *found, *device, refusal)
        status.attachment_detail = " ".join(filter(None, sentences))
    status.optimizer_loaded = not session.other_weights
    status.optimizer_step = session.optimizer.step_count
    status.state_size_bytes = session.optimizer.state_size_bytes()
    _show_version(status, session)


def _show_version(status: pb.ServerStatus, session: Session) -> None:
    # That of an engine before this one may still be counted.
    if status.engine_epoch == session.attachment.epoch:
        status.weight_version = session.weight_version
