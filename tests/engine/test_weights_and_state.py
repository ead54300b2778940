"""After a restore or an undo, however the server ends: weights, moments and step of one model.

A killed server is what is on disk and in the engine at that instant: `Crash` keeps both, and a new
server begins from them. Real kills are in tests/services/test_kill_restore.py.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_grpc.errors import Aborted, FailedPrecondition, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import FILE_NAME, RUNNING_FILE_NAME
from apollo_trainer.checkpoints.snapshots.value_exchange import Exchange
from apollo_trainer.engine.model_checkpoints import ModelCheckpoints
from apollo_trainer.engine.pause import EnginePause
from apollo_trainer.engine.state_saver import CapturedState, StateSaver
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from apollo_trainer.operations.restore import Restored
from tests.waiting import HANG, wait_until

ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
DETACHED = status_pb2.ATTACHMENT_STATE_DETACHED
FAST = pb.OptimizerConfig(lr=1e-2)
SEED = 20412
State = dict[str, torch.Tensor]
Events = Callable[[Any], list[pb.RunEvent]]


@dataclass
class Model:
    """What must stay together: the served weights, and the Apollo state."""

    weights: State
    moments: State
    step: int

    @classmethod
    def of(cls, engine: Any, trainer: Any) -> Model:
        optimizer = trainer.owner.session().optimizer
        moments = {name: t.clone() for name, t in optimizer.named_state()[0].items()}
        return cls(engine.model.values(), moments, optimizer.step_count)

    def differs_from(self, other: Model) -> list[str]:
        """What is not the same, bit for bit."""
        found = [n for n, t in self.weights.items() if not torch.equal(t, other.weights[n])]
        found += [n for n, t in self.moments.items() if not torch.equal(t, other.moments[n])]
        return found + ([] if self.step == other.step else [f"step {self.step} {other.step}"])


class Crash:
    """What a server leaves that is killed now."""

    def __init__(self, engine: Any, state_dir: Path, folder: Path):
        self._engine, self.folder = engine, folder
        # A copy is of no one instant: the ledger must not be at work meanwhile.
        wait_until(lambda: not list(state_dir.glob("journal/*")), "the end of the journals")
        self._weights = engine.model.values()
        shutil.copytree(state_dir, folder, ignore=shutil.ignore_patterns("*.sock*", "*.lock"))

    def happen(self) -> None:
        """The engine's weights are again what they were then; the server has ended."""
        with torch.no_grad():
            for name, parameter in self._engine.model.module.named_parameters():
                parameter.copy_(self._weights[name])


def back(trainer: Any, how: str) -> Restored:
    """The way back to the state of the snapshot."""
    jobs = CheckpointJobs(trainer.owner, trainer.board)
    if how == "undo":
        return jobs.undo(3, None).result(HANG)
    return jobs.restore("anchor", None, lambda *_: None).result(HANG)


@pytest.fixture
def learned(attached: Any, all_events: Events) -> Any:
    """An engine and a trainer at step 5; what they were at step 2, and the losses after that."""
    engine, trainer = attached
    jobs = CheckpointJobs(trainer.owner, trainer.board)
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    jobs.snapshot("anchor", lambda *_: None).result(HANG)
    anchor = Model.of(engine, trainer)
    losses = losses_of(all_events(trainer.submit(epochs=3, optimizer=FAST)))
    return engine, trainer, anchor, losses


def losses_of(events: list[pb.RunEvent]) -> list[float]:
    return [event.step.loss for event in events if event.HasField("step")]


HOW = pytest.mark.parametrize("how", ["restore", "undo"])


@HOW
def test_after_a_graceful_restart_all_is_what_was_restored(
    learned: Any, start_trainer: Any, all_events: Events, how: str
) -> None:
    engine, trainer, anchor, losses = learned
    assert back(trainer, how).optimizer_step == 2
    for _ in range(2):
        trainer.stop()
        trainer = start_trainer()
        status = trainer.wait_for(ATTACHED)
        assert (status.optimizer_step, status.weight_version) == (2, 6)
        assert not Model.of(engine, trainer).differs_from(anchor)
    assert losses_of(all_events(trainer.submit(epochs=3, optimizer=FAST))) == losses
    trainer.stop()
    assert start_trainer().wait_for(ATTACHED).optimizer_step == 5


@contextmanager
def crashing_at(
    patch: pytest.MonkeyPatch, owner: type, method: str, crash: Callable[[], None], nth: int = 1
) -> Any:
    """Has `crash` called before and after the nth call of a method."""
    original, calls = getattr(owner, method), []

    def watched(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            crash()
        result = original(*arguments, **named)
        if len(calls) == nth:
            crash()
        return result

    with patch.context() as patched:
        patched.setattr(owner, method, watched)
        yield
    assert len(calls) >= nth


INSTANTS = {
    "the first write": (Exchange, "_piece", 1),
    "some write": (Exchange, "_piece", random.Random(SEED).randint(2, 20)),
    "the resume": (EnginePause, "end", 1),
    "the save": (StateSaver, "save_and_wait", 1),
    "the end": (ModelCheckpoints, "end_restore", 1),
}


# Undo takes the same way; the rest of its instants are for `make test-all`.
RARER = ("some write", "the resume", "the end")
KILLS = [("restore", instant) for instant in INSTANTS]
KILLS += [
    pytest.param("undo", instant, marks=[pytest.mark.long] if instant in RARER else [])
    for instant in INSTANTS
]


@pytest.mark.parametrize(("how", "instant"), KILLS)
def test_killed_around_its_answer_all_is_of_one_model_or_refused(
    learned: Any,
    start_trainer: Any,
    all_events: Events,
    state_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    instant: str,
) -> None:
    engine, trainer, anchor, losses = learned
    latest, crashes = Model.of(engine, trainer), list[Crash]()

    def crash() -> None:
        crashes.append(Crash(engine, state_dir, tmp_path / f"crash-{len(crashes)}"))

    owner, method, nth = INSTANTS[instant]
    with crashing_at(monkeypatch, owner, method, crash, nth):
        back(trainer, how)
    crash()
    trainer.stop()
    refused = []
    for left in crashes:
        left.happen()
        again = start_trainer(state_dir=left.folder)
        again.wait_for(ATTACHED)
        refused.append(is_refused(again, all_events))
        if refused[-1]:
            assert "Runs are refused" in again.status.attachment_detail
            CheckpointJobs(again.owner, again.board).restore("anchor", None, print).result(HANG)
            assert not Model.of(engine, again).differs_from(anchor)
        else:
            found = Model.of(engine, again)
            assert not found.differs_from(anchor) or not found.differs_from(latest)
        again.stop()
    assert not refused[-1], "its answer had come"
    last = start_trainer(state_dir=crashes[-1].folder)
    last.wait_for(ATTACHED)
    assert not Model.of(engine, last).differs_from(anchor)
    assert losses_of(all_events(last.submit(epochs=3, optimizer=FAST))) == losses


def is_refused(trainer: Any, all_events: Events) -> bool:
    """Whether a run that changes nothing is refused, and told what to do."""
    finished = all_events(trainer.submit(dry_run=True))[-1].finished
    if not finished.HasField("failure"):
        return False
    assert finished.failure.reason == "WEIGHTS_POISONED"
    assert "Restore a snapshot" in finished.failure.message
    return True


@HOW
def test_a_restored_model_that_went_with_its_engine_is_not_mixed_with_another(
    learned: Any, start_engine: Any, how: str
) -> None:
    engine, trainer, anchor, _ = learned
    back(trainer, how)
    engine.stop()
    trainer.wait_for(DETACHED)
    new = start_engine()
    trainer.wait_for(ATTACHED, new.engine.epoch)
    with pytest.raises(FailedPrecondition) as refused:
        trainer.submit()
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"
    back(trainer, "restore")
    assert "Runs are refused" not in trainer.status.attachment_detail
    assert not Model.of(new, trainer).differs_from(anchor)


@HOW
def test_a_restored_model_that_was_synced_is_whole_beside_the_next_engine(
    learned: Any, start_engine: Any, all_events: Events, how: str
) -> None:
    engine, trainer, anchor, losses = learned
    back(trainer, how)
    CheckpointJobs(trainer.owner, trainer.board).sync(lambda *_: None).result(HANG)
    engine.stop()
    trainer.wait_for(DETACHED)
    new = start_engine()
    trainer.wait_for(ATTACHED, new.engine.epoch)
    assert not Model.of(new, trainer).differs_from(anchor)
    assert losses_of(all_events(trainer.submit(epochs=3, optimizer=FAST))) == losses


def refuse_to_write(state: CapturedState) -> int:
    raise OSError(28, "No space left on device")


def test_a_restored_state_that_no_disk_takes_is_told_and_a_kill_is_refused(
    learned: Any,
    start_trainer: Any,
    all_events: Events,
    state_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, trainer, anchor, losses = learned
    with monkeypatch.context() as full:
        full.setattr(CapturedState, "write", refuse_to_write)
        (warning,) = back(trainer, "undo").warnings
        assert warning.reason == "STATE_NOT_SAVED"
        assert "No space left" in warning.message
        finished = all_events(trainer.submit())[-1].finished
        assert finished.failure.reason == "STATE_NOT_SAVED", "no run begins on it"
    crash = Crash(engine, state_dir, tmp_path / "crash")
    assert losses_of(all_events(trainer.submit(epochs=3, optimizer=FAST))) == losses
    trainer.stop()
    kept = start_trainer()
    assert kept.wait_for(ATTACHED).optimizer_step == 5, "once it was saved, nothing is refused"
    kept.stop()

    crash.happen()
    again = start_trainer(state_dir=crash.folder)
    again.wait_for(ATTACHED)
    assert is_refused(again, all_events)
    back(again, "restore")
    assert not Model.of(engine, again).differs_from(anchor)


def test_a_state_that_was_not_saved_after_its_run_is_saved_at_the_end(
    attached: Any, start_trainer: Any, all_events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    with monkeypatch.context() as full:
        full.setattr(CapturedState, "write", refuse_to_write)
        events = all_events(trainer.submit(epochs=2, optimizer=FAST))
    assert [e.warning.reason for e in events if e.HasField("warning")] == ["STATE_NOT_SAVED"]
    left = Model.of(engine, trainer)
    trainer.stop()
    again = start_trainer()
    again.wait_for(ATTACHED)
    assert not Model.of(engine, again).differs_from(left)


def test_the_newer_of_two_states_of_one_engine_is_taken(
    learned: Any, start_trainer: Any, state_dir: Path
) -> None:
    engine, trainer, anchor, _ = learned
    (final,) = state_dir.glob(f"models/*/{FILE_NAME}")
    session = trainer.owner.session()
    session.capture(running=True).write()
    running = final.with_name(RUNNING_FILE_NAME)
    older = running.read_bytes()
    back(trainer, "undo")
    # Killed between the new state's rename and the removal of the run's.
    running.write_bytes(older)
    trainer.stop()
    again = start_trainer()
    again.wait_for(ATTACHED)
    assert not Model.of(engine, again).differs_from(anchor)


def test_weights_that_no_run_explains_are_refused(
    learned: Any, start_trainer: Any, tmp_path: Path
) -> None:
    """Two servers in turn, each with a state of its own: neither steps the other's weights."""
    _engine, first, _, _ = learned
    first.stop()
    second = start_trainer(state_dir=tmp_path)
    second.wait_for(ATTACHED)
    run(second)
    second.stop()
    again = start_trainer()
    assert "another training server" in again.wait_for(ATTACHED).attachment_detail
    with pytest.raises(FailedPrecondition) as refused:
        again.submit()
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"


def run(trainer: Any) -> None:
    """One run, to its end."""
    log = trainer.submit(optimizer=FAST)
    wait_until(lambda: trainer.queue.log_of(log.run_id) is None, "the end of the run")


def test_a_second_training_server_waits_until_the_first_has_gone(
    attached: Any, start_trainer: Any, tmp_path: Path, wait: Any
) -> None:
    engine, first = attached
    second = start_trainer(state_dir=tmp_path)
    wait(lambda: "Another training server" in second.status.attachment_detail, "the refusal")
    with pytest.raises(Unavailable, match="Stop that one first"):
        second.owner.session()
    assert first.status.attachment == ATTACHED
    first.stop()
    assert second.wait_for(ATTACHED).engine_epoch == engine.engine.epoch


FAILS = {"resume_generation": True, "reset_prefix_cache": False}


@HOW
@pytest.mark.parametrize("call", FAILS)
def test_a_vllm_that_is_not_resumed_is_told_with_what_was_done(
    learned: Any, all_events: Events, wait: Any, how: str, call: str
) -> None:
    engine, trainer, anchor, losses = learned

    def fail() -> None:
        raise RuntimeError("out of luck")

    engine.client.before[call] = fail
    result = back(trainer, how)
    assert [warning.reason for warning in result.warnings] == ["ENGINE_NOT_RESUMED"]
    assert "are the restored ones" in result.warnings[0].message
    assert not Model.of(engine, trainer).differs_from(anchor)
    assert (result.optimizer_step, result.weight_version) == (2, 6)
    assert (trainer.status.optimizer_step, trainer.status.weight_version) == (2, 6)
    jobs = CheckpointJobs(trainer.owner, trainer.board)
    assert isinstance(jobs.undo(1, 5).exception(HANG), Aborted), "of another's old version"
    assert engine.engine.paused == FAILS[call]
    engine.client.before.clear()
    wait(lambda: engine.calls[-1] in ("resume", "reset caches"), "the sidecar's next attempt")
    wait(lambda: not engine.engine.paused, "the resume")
    assert engine.engine.weight_version == 6
    assert losses_of(all_events(trainer.submit(epochs=3, optimizer=FAST))) == losses


def test_an_engine_that_goes_while_it_is_restored_takes_what_was_restored_with_it(
    learned: Any, start_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer, anchor, _ = learned
    end = EnginePause.end

    def stop_first(pause: EnginePause, **named: Any) -> int:
        engine.stop()
        return end(pause, **named)

    monkeypatch.setattr(EnginePause, "end", stop_first)
    with pytest.raises(Unavailable) as lost:
        back(trainer, "restore")
    assert lost.value.reason == "ENGINE_LOST"
    monkeypatch.undo()
    trainer.wait_for(DETACHED)
    new = start_engine()
    trainer.wait_for(ATTACHED, new.engine.epoch)
    with pytest.raises(FailedPrecondition) as refused:
        trainer.submit()
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"
    back(trainer, "restore")
    assert not Model.of(new, trainer).differs_from(anchor)


def test_a_restored_model_of_an_engine_that_comes_back_is_whole(
    learned: Any, all_events: Events, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer, anchor, losses = learned
    end = EnginePause.end

    def lose_sight(pause: EnginePause, **named: Any) -> int:
        engine.drop_connections()
        wait(lambda: trainer.status.attachment == DETACHED, "the loss")
        return end(pause, **named)

    with monkeypatch.context() as patch:
        patch.setattr(EnginePause, "end", lose_sight)
        trainer.owner.session().settings.lease_seconds = 0.5
        with pytest.raises(Unavailable):
            back(trainer, "undo")
    trainer.wait_for(ATTACHED, engine.engine.epoch)
    assert not Model.of(engine, trainer).differs_from(anchor)
    assert losses_of(all_events(trainer.submit(epochs=3, optimizer=FAST))) == losses


def test_a_version_that_only_the_sidecar_knows_is_what_a_caller_is_checked_against(
    learned: Any, wait: Any
) -> None:
    engine, trainer, _, _ = learned
    engine.engine.raise_version(1)
    wait(lambda: trainer.status.weight_version == 6, "the news")
    jobs = CheckpointJobs(trainer.owner, trainer.board)
    assert isinstance(jobs.restore("anchor", 5, print).exception(HANG), Aborted)
