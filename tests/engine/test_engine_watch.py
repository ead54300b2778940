"""An engine is found, lost in silence, found again, and never trained with another's state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_grpc import process_state
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_sidecar import engine as sidecar_engine
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from tests.engine_double import EngineDouble
from tests.waiting import HANG, at_most

Events = Callable[[Any], list[pb.RunEvent]]
ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
DETACHED = status_pb2.ATTACHMENT_STATE_DETACHED
FAST = pb.OptimizerConfig(lr=1e-2)
PAUSE_RUN = pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_RUN)
NOTICE_SECONDS = 2.0


@pytest.fixture
def worker(attached: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that the engine takes for its worker."""
    engine, _ = attached
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    engine.engine._worker_pids = [process.pid]
    yield process
    process.kill()
    process.wait()


def test_a_stopped_worker_is_noticed_within_two_seconds_and_found_again(
    attached: Any, worker: Any
) -> None:
    engine, trainer = attached
    with at_most(NOTICE_SECONDS):
        worker.send_signal(signal.SIGSTOP)
        trainer.wait_for(DETACHED)
    assert "wedged" in trainer.status.attachment_detail
    worker.send_signal(signal.SIGCONT)
    trainer.wait_for(ATTACHED, engine.engine.epoch)


def test_a_sidecar_that_has_too_much_to_do_is_waited_for(
    attached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vLLM that answered 300 requests a second on a busy CPU was taken for wedged."""
    _, trainer = attached
    session = trainer.owner.live_session
    monkeypatch.setattr(sidecar_engine, "BEAT_SECONDS", 2 * NOTICE_SECONDS)
    lost = threading.Event()
    monkeypatch.setattr(trainer.owner, "engine_lost", lambda why: lost.set())
    assert not lost.wait(4 * NOTICE_SECONDS)
    assert trainer.owner.live_session is session


def test_a_stopped_sidecar_is_noticed_within_two_seconds(
    start_engine: Any, start_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) as process:
        engine = start_engine()
        own = process.pid, process_state.namespace()
        monkeypatch.setattr(process_state, "own", lambda: own)
        trainer = start_trainer()
        trainer.wait_for(ATTACHED, engine.engine.epoch)
        monkeypatch.setattr(sidecar_engine, "BEAT_SECONDS", 2 * NOTICE_SECONDS)
        with at_most(NOTICE_SECONDS):
            process.send_signal(signal.SIGSTOP)
            trainer.wait_for(DETACHED)
        assert "wedged" in trainer.status.attachment_detail
        process.kill()


def test_a_probe_that_takes_longer_than_an_engine_may_be_silent_loses_none(
    start_engine: Any, start_trainer: Any
) -> None:
    engine, probes = start_engine(), list[int]()

    def last(number: int) -> None:
        probes.append(number)
        time.sleep(NOTICE_SECONDS if number == 1 else 0.0)

    engine.client.on_probe = last
    start_trainer(probe_weights=True).wait_for(ATTACHED, engine.engine.epoch)
    assert probes.count(1) == 1


def test_a_loss_is_told_before_the_collection_that_stops_every_thread(
    attached: Any, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = attached
    told: list[int] = []
    monkeypatch.setattr("gc.collect", lambda: told.append(trainer.status.attachment))
    engine.stop()
    wait(lambda: told, "the collection of what was unmapped")
    assert told[0] == DETACHED


def test_a_paused_engine_that_does_not_answer_fails_its_run_within_two_seconds(
    attached: Any, all_events: Events, wait: Any
) -> None:
    engine, trainer = attached
    trainer.owner.session().settings.lease_seconds = 2.0
    log = trainer.submit(epochs=100_000, coherence=PAUSE_RUN)
    wait(lambda: log.sequence > 4, "a step")
    # One answer may be on its way; then three beats fail.
    with at_most(NOTICE_SECONDS + 0.5):
        engine.client.answers_pings = False
        finished = all_events(log)[-1].finished
    assert finished.failure.reason == "ENGINE_LOST"
    engine.client.answers_pings = True
    wait(lambda: not engine.engine.leases.active, "the end of the lease")
    trainer.wait_for(ATTACHED, engine.engine.epoch)


def test_the_state_in_memory_is_kept_for_an_engine_that_comes_back(
    attached: Any, worker: Any, all_events: Events, wait: Any
) -> None:
    _, trainer = attached
    trainer.owner.session().settings.lease_seconds = 2.0
    log = trainer.submit(epochs=100_000, optimizer=FAST)
    wait(lambda: log.sequence > 6, "steps")
    worker.send_signal(signal.SIGSTOP)
    finished = all_events(log)[-1].finished
    assert finished.failure.reason == "ENGINE_LOST"
    worker.send_signal(signal.SIGCONT)
    # Nothing was saved after the run; the steps are in the weights, which are still there.
    assert trainer.wait_for(ATTACHED).optimizer_step == finished.steps_done
    assert not trainer.owner.session().other_weights


def test_a_lost_engines_memory_is_unmapped(attached: Any, wait: Any) -> None:
    engine, _ = attached
    inode = os.fstat(engine.model.live._fd).st_ino

    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(line.split(maxsplit=5)[4] == str(inode) for line in lines)

    assert mapped() == 2
    engine.stop()
    wait(lambda: mapped() == 1, "the trainer's unmapping")


def test_a_state_is_not_used_on_other_weights_until_told(
    attached: Any, start_engine: Any, all_events: Events
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(epochs=3, optimizer=FAST))
    # Its weights go with it: nothing was synced.
    engine.stop()
    trainer.wait_for(DETACHED)
    new = start_engine()
    status = trainer.wait_for(ATTACHED, new.engine.epoch)
    assert "Runs are refused" in status.attachment_detail
    assert not status.optimizer_loaded
    before = new.model.values()
    with pytest.raises(FailedPrecondition, match="accept_other_weights") as refused:
        trainer.submit(optimizer=FAST)
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"
    assert all(torch.equal(before[n], value) for n, value in new.model.values().items())

    accepting = pb.OptimizerConfig(lr=1e-2, accept_other_weights=True)
    events = all_events(trainer.submit(optimizer=accepting))
    assert events[1].started.optimizer_step == 3
    # Told once, it is the state of these weights.
    assert all_events(trainer.submit(optimizer=FAST))[1].started.optimizer_step == 4


def test_a_model_that_was_moved_is_said_to_have_a_state_at_its_old_path(
    attached: Any, model_folder: Path, sidecar_address: str, all_events: Events, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine, trainer = attached
    all_events(trainer.submit(optimizer=FAST))
    CheckpointJobs(trainer.owner, trainer.board).sync(lambda *_: None).result(HANG)
    engine.stop()
    trainer.wait_for(DETACHED)
    old = trainer.settings.state_dir / "models"
    (folder,) = old.iterdir()
    moved = tmp_path / "elsewhere" / model_folder.name
    moved.parent.mkdir()
    model_folder.rename(moved)
    new = EngineDouble(moved, sidecar_address)
    trainer.wait_for(ATTACHED, new.engine.epoch)
    new.stop()
    assert f"{folder} is of a model directory of the same name" in caplog.text
    assert trainer.status.optimizer_step == 0


def test_a_reset_begins_a_state_of_the_weights_that_are_there(
    attached: Any, start_engine: Any, all_events: Events
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(epochs=3, optimizer=FAST))
    engine.stop()
    trainer.wait_for(DETACHED)
    trainer.wait_for(ATTACHED, start_engine().engine.epoch)
    reset = pb.OptimizerConfig(lr=1e-2, reset_optimizer=True)
    assert all_events(trainer.submit(optimizer=reset))[1].started.optimizer_step == 0


def test_a_refused_state_stays_as_it_is_on_disk(
    attached: Any, start_engine: Any, start_trainer: Any, all_events: Events
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(epochs=3, optimizer=FAST))
    path = trainer.owner.session().state_path
    saved = path.read_bytes()
    engine.stop()
    trainer.wait_for(DETACHED)
    trainer.wait_for(ATTACHED, start_engine().engine.epoch)
    trainer.stop()
    assert path.read_bytes() == saved
    assert "Runs are refused" in start_trainer().wait_for(ATTACHED).attachment_detail


def test_synced_weights_are_those_of_the_state_after_a_restart(
    attached: Any, start_engine: Any, all_events: Events
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(epochs=3, optimizer=FAST))
    CheckpointJobs(trainer.owner, trainer.board).sync(lambda *_: None).result(HANG)
    engine.stop()
    trainer.wait_for(DETACHED)
    assert trainer.wait_for(ATTACHED, start_engine().engine.epoch).optimizer_step == 3
    assert all_events(trainer.submit(optimizer=FAST))[1].started.optimizer_step == 3


def test_a_new_server_waits_for_the_pause_of_one_that_died(
    attached: Any, start_trainer: Any
) -> None:
    engine, trainer = attached
    trainer.stop()
    engine.engine.leases.acquire("of a server that died", 1.0, "keep")
    began = time.monotonic()
    start_trainer().wait_for(ATTACHED)
    assert time.monotonic() - began > 0.7
