"""What the queue of runs does while a disk is slow: whoever only looks does not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine.state_saver import CapturedState
from apollo_trainer.ledger.ledger import Ledger
from tests.waiting import HANG

Events = Callable[[Any], list[pb.RunEvent]]


class Threads:
    """Calls on threads of their own; what they return."""

    def __init__(self, *calls: Callable[[], Any]):
        self.results: list[Any] = []
        self._threads = [
            threading.Thread(target=lambda call=call: self.results.append(call()), daemon=True)
            for call in calls
        ]
        for thread in self._threads:
            thread.start()

    def end(self, seconds: float = HANG) -> list[Any]:
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive()
        return self.results


def test_an_event_loop_waits_for_no_run_that_is_being_accepted(
    attached: Any, all_events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = attached
    reading, may_read = threading.Event(), threading.Event()

    def read_slowly(ledger: Ledger, request_id: str) -> None:
        reading.set()
        assert may_read.wait(HANG)

    monkeypatch.setattr(Ledger, "run_of_request", read_slowly)
    submitting = Threads(lambda: trainer.submit("mine"))
    assert reading.wait(HANG)
    assert Threads(lambda: trainer.queue.log_of("another")).end(1) == [None]
    may_read.set()
    (log,) = submitting.end()
    assert all_events(log)[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_an_engine_that_dies_in_a_save_leaves_a_run_that_ends_with_finished(
    start_engine: Any, start_trainer: Any, wait: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from apollo_grpc.v1 import status_pb2

    engine, trainer = start_engine(), start_trainer(save_steps=2, save_seconds=0)
    trainer.wait_for(status_pb2.ATTACHMENT_STATE_ATTACHED)
    saving, may_save, write = threading.Event(), threading.Event(), CapturedState.write

    def write_slowly(state: CapturedState) -> int:
        if state.optimizer_step:
            saving.set()
            assert may_save.wait(HANG)
        return write(state)

    monkeypatch.setattr(CapturedState, "write", write_slowly)
    log = trainer.submit(epochs=100_000)
    assert saving.wait(HANG)
    engine.stop()
    wait(lambda: trainer.queue.log_of(log.run_id) is None, "the end of the run")
    with (trainer.settings.state_dir / "another").open("wb") as other:
        may_save.set()
        wait(lambda: trainer.owner.saver.idle, "the save")
        assert not other.tell() and not (trainer.settings.state_dir / "another").stat().st_size
    trainer.stop()
    assert f"run {log.run_id} has ended; too late: state_saved" in caplog.text
    kinds = [e.WhichOneof("event") for e in log._tail]
    assert kinds[-1] == "finished"
