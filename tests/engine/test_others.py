"""Somebody else pauses vLLM, lets it go on, or changes its weights: noticed before a write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import pause
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from tests.waiting import HANG

ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
DETACHED = status_pb2.ATTACHMENT_STATE_DETACHED
Events = Callable[[Any], list[pb.RunEvent]]
Wait = Callable[..., None]
FAST = pb.OptimizerConfig(lr=1e-2)
PAUSE_RUN = pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_RUN)
ACCEPTING = pb.OptimizerConfig(lr=1e-2, accept_other_weights=True)
MODES = (pb.COHERENCE_MODE_PAUSE_RUN, pb.COHERENCE_MODE_PAUSE_STEP, pb.COHERENCE_MODE_LIVE)


@pytest.fixture(autouse=True)
def confirmed_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pause, "CONFIRMED_SECONDS", 0.0)
    yield


def finished(events: list[pb.RunEvent]) -> pb.RunEvent.Finished:
    return events[-1].finished


def reload(engine: Any, values: dict[str, torch.Tensor], *, told: bool = True) -> None:
    """As vLLM's reload_weights: other values in the same memory."""
    if told:
        engine.model.live.generation.advance()
    with torch.no_grad():
        for name, parameter in engine.model.module.named_parameters():
            parameter.copy_(values[name])


def attached_again(trainer: Any, before: Any, wait: Wait) -> None:
    wait(lambda: trainer.owner.live_session not in (None, before), "another session")
    trainer.wait_for(ATTACHED)


def found_generation(trainer: Any) -> int:
    session = trainer.owner.live_session
    return session.attachment.found_generation if session else 0


def same(engine: Any, values: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(values[name], now) for name, now in engine.model.values().items())


# --- weights that somebody else changes ------------------------------------------------------


def test_weights_that_were_reloaded_are_attached_again_and_runs_are_refused(
    attached: Any, all_events: Events, wait: Wait
) -> None:
    engine, trainer = attached
    loaded, session = engine.model.values(), trainer.owner.live_session
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    reload(engine, loaded)
    attached_again(trainer, session, wait)
    assert "Runs are refused: The Apollo state on disk" in trainer.status.attachment_detail
    with pytest.raises(FailedPrecondition) as refused:
        trainer.submit(optimizer=FAST)
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"
    assert same(engine, loaded)
    events = all_events(trainer.submit(optimizer=ACCEPTING))
    assert finished(events).state == pb.RUN_STATE_SUCCEEDED
    assert events[1].started.optimizer_step == 2


def test_weights_that_are_those_of_the_state_again_are_trained_on(
    attached: Any, all_events: Events, wait: Wait
) -> None:
    engine, trainer = attached
    session = trainer.owner.live_session
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    reload(engine, engine.model.values())
    attached_again(trainer, session, wait)
    events = all_events(trainer.submit(optimizer=FAST))
    assert finished(events).state == pb.RUN_STATE_SUCCEEDED
    assert events[1].started.optimizer_step == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_reload_in_mid_run_ends_it_before_the_next_write(
    attached: Any, all_events: Events, wait: Wait, mode: Any
) -> None:
    engine, trainer = attached
    loaded = engine.model.values()
    log = trainer.submit(
        epochs=100_000, optimizer=FAST, coherence=pb.Coherence(mode=mode, cache_policy=1)
    )
    wait(lambda: log.sequence > 4, "the third step")
    engine.model.live.generation.advance()
    ended = finished(all_events(log))
    assert (ended.state, ended.failure.reason) == (pb.RUN_STATE_FAILED, "WEIGHTS_CHANGED")
    assert "Somebody else changed vLLM's weights" in ended.failure.message
    assert ended.steps_done > 0
    reload(engine, loaded)
    generation = engine.model.live.generation.now
    wait(lambda: found_generation(trainer) == generation, "the attachment to what was loaded")
    assert not engine.engine.leases.active, "vLLM need not wait for a lease to run out"
    # Otherwise the steps of the run would be taken for what tells weights and state apart.
    with pytest.raises(FailedPrecondition) as refused:
        trainer.submit(optimizer=FAST)
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"
    assert same(engine, loaded)


@pytest.mark.parametrize("mode", MODES)
def test_after_a_reload_of_what_the_state_is_of_no_step_of_the_lost_run_is_counted(
    attached: Any, all_events: Events, wait: Wait, mode: Any
) -> None:
    engine, trainer = attached
    assert finished(all_events(trainer.submit(epochs=2, optimizer=FAST))).steps_done == 2
    trainer.owner.saver.flush()
    loaded, session = engine.model.values(), trainer.owner.live_session
    log = trainer.submit(
        epochs=100_000, optimizer=FAST, coherence=pb.Coherence(mode=mode, cache_policy=1)
    )
    wait(lambda: log.sequence > 4, "the third step")
    engine.model.live.generation.advance()
    assert finished(all_events(log)).failure.reason == "WEIGHTS_CHANGED"
    reload(engine, loaded)
    attached_again(trainer, session, wait)
    assert all_events(trainer.submit(optimizer=FAST))[1].started.optimizer_step == 2


def test_a_reload_right_before_a_lease_would_refuse_it_is_not_written_over(
    attached: Any, all_events: Events, wait: Wait
) -> None:
    engine, trainer = attached
    coherence = pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_STEP)
    log = trainer.submit(epochs=100_000, optimizer=FAST, coherence=coherence)
    wait(lambda: log.sequence > 4, "the third step")
    loaded: list[Any] = []

    def reload_now() -> None:
        loaded.append(engine.model.values())
        engine.model.live.generation.advance()

    engine.client.before["apollo_hold"] = reload_now
    ended = finished(all_events(log))
    assert ended.failure.reason == "WEIGHTS_CHANGED"
    assert same(engine, loaded[0]) and len(loaded) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_change_that_nobody_told_of_is_seen_before_the_next_runs_first_write(
    attached: Any, all_events: Events, wait: Wait, mode: Any
) -> None:
    engine, trainer = attached
    loaded, session = engine.model.values(), trainer.owner.live_session
    coherence = pb.Coherence(mode=mode)
    for _ in range(2):
        assert finished(all_events(trainer.submit(optimizer=FAST, coherence=coherence))).steps_done
    reload(engine, loaded, told=False)
    ended = finished(all_events(trainer.submit(optimizer=FAST, coherence=coherence)))
    assert (ended.failure.reason, ended.steps_done) == ("WEIGHTS_CHANGED", 0)
    assert same(engine, loaded)
    attached_again(trainer, session, wait)
    with pytest.raises(FailedPrecondition) as refused:
        trainer.submit(optimizer=FAST)
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"


@pytest.mark.parametrize("what", ["undo", "sync", "restore"])
def test_what_others_changed_is_neither_synced_nor_mixed_with_what_was_taken_back(
    attached: Any, all_events: Events, what: str
) -> None:
    engine, trainer = attached
    loaded, jobs = engine.model.values(), CheckpointJobs(trainer.owner, trainer.board)
    jobs.snapshot("kept", lambda *_: None).result(HANG)
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    reload(engine, loaded, told=False)
    work = {
        "undo": lambda: jobs.undo(1, None),
        "sync": lambda: jobs.sync(lambda *_: None),
        "restore": lambda: jobs.restore("kept", None, lambda *_: None),
    }
    with pytest.raises(ApolloError) as refused:
        work[what]().result(HANG)
    # The updates that can be taken back know what they wrote.
    assert refused.value.reason == ("UNDO_STALE" if what == "undo" else "WEIGHTS_CHANGED")
    assert same(engine, loaded)


def test_undo_and_restore_are_no_change_by_others(attached: Any, all_events: Events) -> None:
    _, trainer = attached
    jobs = CheckpointJobs(trainer.owner, trainer.board)
    jobs.snapshot("kept", lambda *_: None).result(HANG)
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    jobs.undo(1, None).result(HANG)
    assert finished(all_events(trainer.submit(optimizer=FAST))).state == pb.RUN_STATE_SUCCEEDED
    jobs.restore("kept", None, lambda *_: None).result(HANG)
    assert finished(all_events(trainer.submit(optimizer=FAST))).state == pb.RUN_STATE_SUCCEEDED


def test_a_new_training_server_counts_no_steps_on_weights_that_others_changed(
    attached: Any, start_trainer: Callable[..., Any], all_events: Events
) -> None:
    engine, trainer = attached
    loaded = engine.model.values()
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    trainer.stop()
    reload(engine, loaded)
    again = start_trainer()
    again.wait_for(ATTACHED)
    with pytest.raises(FailedPrecondition) as refused:
        again.submit(optimizer=FAST)
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"


# --- a pause that somebody else wants --------------------------------------------------------


def pause_by_user(engine: Any) -> None:
    engine.call(engine.client.pause_generation(mode="keep", clear_cache=False))


@pytest.mark.parametrize("mode", MODES)
def test_under_a_users_pause_a_run_goes_on_and_vllm_stays_paused(
    attached: Any, all_events: Events, wait: Wait, mode: Any
) -> None:
    engine, trainer = attached
    pause_by_user(engine)
    wait(lambda: "paused by somebody else" in trainer.status.attachment_detail, "the status")
    events = all_events(trainer.submit(optimizer=FAST, coherence=pb.Coherence(mode=mode)))
    assert finished(events).state == pb.RUN_STATE_SUCCEEDED
    assert engine.client._paused
    (warning,) = [event.warning for event in events if event.HasField("warning")]
    assert warning.reason == "LIVENESS_NOT_COMPARED"
    assert "paused by somebody else" in warning.message
    engine.call(engine.client.resume_generation())
    wait(lambda: "paused" not in trainer.status.attachment_detail, "the status")
    assert finished(all_events(trainer.submit(optimizer=FAST))).state == pb.RUN_STATE_SUCCEEDED
    assert not engine.client._paused


def test_a_user_who_lets_vllm_go_on_in_mid_run_ends_it_before_the_next_write(
    attached: Any, all_events: Events, wait: Wait
) -> None:
    engine, trainer = attached
    log = trainer.submit(epochs=100_000, optimizer=FAST, coherence=PAUSE_RUN)
    wait(lambda: log.sequence > 4, "the third step")
    engine.call(engine.client.resume_generation())
    ended = finished(all_events(log))
    assert (ended.state, ended.failure.reason) == (pb.RUN_STATE_FAILED, "PAUSE_LOST")
    assert "Somebody else let vLLM go on" in ended.failure.message
    assert ended.weight_version == ended.steps_done + 1, "one was counted as the lease ended"
    assert engine.calls.count("reset caches") == 2
    assert finished(all_events(trainer.submit(optimizer=FAST))).state == pb.RUN_STATE_SUCCEEDED


def test_an_engine_that_a_user_pauses_is_attached_once_it_goes_on(
    start_engine: Callable[..., Any], start_trainer: Callable[..., Any], wait: Wait
) -> None:
    engine = start_engine()
    pause_by_user(engine)
    trainer = start_trainer()
    wait(lambda: "POST /resume" in trainer.status.attachment_detail, "the reason")
    assert trainer.status.attachment == DETACHED
    with pytest.raises(Unavailable, match="paused by somebody else"):
        trainer.submit()
    engine.call(engine.client.resume_generation())
    assert trainer.wait_for(ATTACHED).engine_epoch == engine.engine.epoch
