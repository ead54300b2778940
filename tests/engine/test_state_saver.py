"""The Apollo state on its way to disk: one write at a time, the newest last, nobody waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import FILE_NAME, RUNNING_FILE_NAME, load_state
from apollo_trainer.engine.state_saver import CapturedState, Saved, StateSaver
from tests.waiting import HANG

Events = Callable[[Any], list[pb.RunEvent]]


@pytest.fixture
def saver() -> Iterator[StateSaver]:
    made = StateSaver()
    yield made
    made.stop()


def state(path: Path, step: int, supersedes: Path | None = None) -> CapturedState:
    tensors = {"m": torch.full((4,), float(step))}
    return CapturedState(path, tensors, {"step": step}, step, supersedes)


def test_saves_that_have_not_begun_become_the_newest_one(
    saver: StateSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, at_work, written = threading.Event(), [], []
    write = CapturedState.write

    def slow(captured: CapturedState) -> int:
        at_work.append(captured.optimizer_step)
        assert len(at_work) == 1, "two at once"
        may_write.wait(HANG)
        written.append(at_work.pop())
        return write(captured)

    monkeypatch.setattr(CapturedState, "write", slow)
    told: list[Saved] = []
    began = time.monotonic()
    saver.save(state(tmp_path / "a", 1), told.append)
    while saver._jobs:
        time.sleep(0.001)
    for step in range(2, 6):
        saver.save(state(tmp_path / "a", step), told.append)
    assert time.monotonic() - began < 5, "whoever saves does not wait"
    assert not saver.idle
    may_write.set()
    saver.flush()
    assert written == [1, 5]
    assert [saved.optimizer_step for saved in told] == [1, 5, 5, 5, 5]
    assert load_state(tmp_path / "a")[1] == {"step": 5}


def test_a_save_that_fails_is_told_and_the_old_file_is_kept(
    saver: StateSaver, tmp_path: Path
) -> None:
    assert saver.save_and_wait(state(tmp_path / "a", 1)).error == ""
    (tmp_path / "b").write_text("no folder")
    failed = saver.save_and_wait(state(tmp_path / "b" / "a", 2))
    assert failed.error
    assert saver.save_and_wait(state(tmp_path / "a", 3)).size_bytes > 0


def test_what_is_superseded_goes_after_the_new_file_is_there(
    saver: StateSaver, tmp_path: Path
) -> None:
    running, final = tmp_path / RUNNING_FILE_NAME, tmp_path / FILE_NAME
    saver.save_and_wait(state(running, 1))
    saver.save_and_wait(state(final, 2, supersedes=running))
    assert (running.exists(), final.exists()) == (False, True)


def test_in_a_run_the_state_is_saved_every_so_many_steps_beside_the_last_runs(
    start_engine: Any, start_trainer: Any, all_events: Events, wait: Any
) -> None:
    from apollo_grpc.v1 import status_pb2

    start_engine()
    trainer = start_trainer(save_steps=5, save_seconds=0)
    trainer.wait_for(status_pb2.ATTACHMENT_STATE_ATTACHED)
    all_events(trainer.submit(epochs=2))
    final = trainer.owner.session().state_path
    before = final.read_bytes()
    log = trainer.submit(epochs=100_000)
    running = final.with_name(RUNNING_FILE_NAME)
    wait(running.exists, "a save in the run")
    assert final.read_bytes() == before
    trainer.queue.cancel(log.run_id)
    events = all_events(log)
    saves = [e.state_saved.optimizer_step for e in events if e.HasField("state_saved")]
    assert len(saves) > 1
    assert all(later - earlier >= 5 for earlier, later in pairwise(saves[:-1]))
    assert not running.exists()
    assert load_state(final)[1]["optimizer"]["step_count"] == events[-1].finished.steps_done + 2


def test_the_first_step_waits_for_no_zeros(
    start_engine: Any, start_trainer: Any, all_events: Events
) -> None:
    from apollo_grpc.v1 import status_pb2

    start_engine()
    trainer = start_trainer(save_steps=0, save_seconds=0)
    trainer.wait_for(status_pb2.ATTACHMENT_STATE_ATTACHED)
    session = trainer.owner.session()
    assert session.save(trainer.owner.saver, running=True) == ""
    running = session.state_path.with_name(RUNNING_FILE_NAME)
    tensors, description = load_state(running)
    assert (tensors, description["optimizer"]["step_count"]) == ({}, 0)
    trainer.stop()
    again = start_trainer()
    again.wait_for(status_pb2.ATTACHMENT_STATE_ATTACHED)
    all_events(again.submit(epochs=2))
    tensors, description = load_state(session.state_path)
    assert description["optimizer"]["step_count"] == 2
    assert any(tensor.any() for tensor in tensors.values())


def test_a_kill_costs_moments_since_the_last_save_and_no_step_number(tiny_model: Path) -> None:
    import signal

    from apollo_client import ApolloClient
    from tests.server_process import served

    settings = {"APOLLO_SAVE_STEPS": "50", "APOLLO_SAVE_SECONDS": "0", "APOLLO_LEASE_SECONDS": "1"}
    with served(tiny_model, **settings) as server:

        def kill() -> None:
            server.wait_for_steps(60)
            server.end(signal.SIGKILL)
            server.start()

        killer = threading.Thread(target=kill)
        killer.start()
        with ApolloClient(server.address) as client:
            sample = {"context_ids": [60, 61], "continuation_ids": [70, 71]}
            *_, last = client.train([sample], epochs=100_000, min_loss=0)
            killer.join()
            finished = last.finished
            assert finished.failure.reason == "INTERRUPTED"
            assert 0 <= finished.state_steps_lost < finished.steps_done
            assert server.wait_attached().optimizer_step == finished.steps_done
            *_, again = client.train([sample])
            assert again.finished.state == pb.RUN_STATE_SUCCEEDED
            assert client.status().optimizer_step == finished.steps_done + 1
