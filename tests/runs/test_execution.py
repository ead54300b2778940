"""A run from queued to finished, on live weights in shared memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import apollo_trainer.runs.steps as steps_module
from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import FILE_NAME
from apollo_trainer.engine.state_saver import CapturedState
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from apollo_trainer.optim import together

Events = Callable[[Any], list[pb.RunEvent]]
FAST = pb.OptimizerConfig(lr=1e-2)
PAUSE_RUN = pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_RUN)


def finished_of(events: list[pb.RunEvent]) -> pb.RunEvent.Finished:
    return events[-1].finished


def test_a_run_tells_its_events_in_order_and_changes_the_served_weights(
    attached: Any, all_events: Events, kinds: Any
) -> None:
    engine, trainer = attached
    before = engine.model.values()
    events = all_events(trainer.submit(epochs=12, optimizer=FAST))
    assert kinds(events) == ["queued", "started", *["step"] * 12, "state_saved", "finished"]
    assert events[1].started.steps_total == 12
    steps = [event.step for event in events[2:-2]]
    assert [s.step for s in steps] == [s.optimizer_step for s in steps] == list(range(1, 13))
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert finished_of(events).state == pb.RUN_STATE_SUCCEEDED
    assert finished_of(events).steps_done == 12
    assert any(not torch.equal(before[n], t) for n, t in engine.model.values().items())
    assert trainer.status.optimizer_step == 12


def test_vllm_is_paused_for_the_run_and_drops_its_caches_before_it_goes_on(
    attached: Any, all_events: Events
) -> None:
    engine, trainer = attached
    events = all_events(trainer.submit(epochs=3, coherence=PAUSE_RUN))
    assert engine.calls == ["pause keep", "reset caches", "resume"]
    assert finished_of(events).weight_version == trainer.status.weight_version == 3
    assert finished_of(events).pause_time.ToNanoseconds() > 0
    assert all_events(trainer.submit())[1].started.weight_version == 3
    assert engine.engine.weight_version == 4


def test_a_refused_step_ends_the_run_resumes_vllm_and_changes_nothing(
    attached: Any, all_events: Events, kinds: Any
) -> None:
    engine, trainer = attached
    with torch.no_grad():
        engine.model.module.model.norm.weight[0] = math.nan
    before = engine.model.values()
    events = all_events(trainer.submit(epochs=3, coherence=PAUSE_RUN))
    assert kinds(events) == ["queued", "started", "state_saved", "finished"]
    assert finished_of(events).state == pb.RUN_STATE_FAILED
    assert finished_of(events).failure.reason == "NONFINITE_LOSS"
    assert finished_of(events).steps_done == 0
    assert engine.calls == ["pause keep", "resume"]
    assert all(t.equal(before[n]) for n, t in engine.model.values().items() if "norm" not in n)


@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        (pb.COHERENCE_MODE_LIVE, ["reset caches"]),
        (pb.COHERENCE_MODE_PAUSE_STEP, ["pause keep", "reset caches", "resume"]),
    ],
)
def test_a_step_that_breaks_halfway_leaves_vllm_at_work_with_its_caches_dropped(
    attached: Any, all_events: Events, monkeypatch: pytest.MonkeyPatch, mode: Any, calls: list[str]
) -> None:
    engine, trainer = attached

    def write_half(job: Any) -> torch.Tensor:
        job.slot.param.add_(1.0)
        raise RuntimeError("secret detail")

    monkeypatch.setattr(together, "step_parameter", write_half)
    finished = finished_of(all_events(trainer.submit(coherence=pb.Coherence(mode=mode))))
    assert finished.failure.reason == "STEP_INCOMPLETE"
    assert "secret" not in finished.failure.message
    assert engine.calls == calls
    # No version names two values of the weights.
    assert finished.weight_version == engine.engine.weight_version == 1
    monkeypatch.undo()
    assert finished_of(all_events(trainer.submit())).state == pb.RUN_STATE_SUCCEEDED


def test_a_state_that_cannot_be_saved_is_a_warning_and_the_run_succeeds(
    attached: Any, all_events: Events, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = attached

    write = CapturedState.write

    def refuse_at_the_end(state: CapturedState) -> int:
        if state.optimizer_step:
            raise OSError(28, "No space left on device")
        return write(state)

    monkeypatch.setattr(CapturedState, "write", refuse_at_the_end)
    events = all_events(trainer.submit())
    assert kinds(events) == ["queued", "started", "step", "warning", "finished"]
    assert events[-2].warning.reason == "STATE_NOT_SAVED"
    assert finished_of(events).state == pb.RUN_STATE_SUCCEEDED


def test_a_new_state_that_no_disk_takes_is_not_trained_with(
    attached: Any, all_events: Events, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = attached
    before = engine.model.values()

    def refuse(state: CapturedState) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CapturedState, "write", refuse)
    events = all_events(trainer.submit())
    assert kinds(events) == ["queued", "finished"]
    assert finished_of(events).failure.reason == "STATE_NOT_SAVED"
    assert engine.calls == []
    assert all(torch.equal(before[n], t) for n, t in engine.model.values().items())


def test_a_pause_that_vllm_ended_fails_the_run_before_the_next_write(
    attached: Any, all_events: Events, monkeypatch: pytest.MonkeyPatch, wait: Any
) -> None:
    engine, trainer = attached
    trainer.owner.session().settings.lease_seconds = 0.6
    take_step = steps_module.take_step

    def end_the_pause_then_step(*arguments: Any) -> Any:
        leases = engine.engine.leases
        if leases.active:
            leases.release(leases._lease_id, True)
        return take_step(*arguments)

    monkeypatch.setattr(steps_module, "take_step", end_the_pause_then_step)
    finished = finished_of(all_events(trainer.submit(epochs=100_000, coherence=PAUSE_RUN)))
    assert finished.failure.reason == "PAUSE_LOST"
    assert 0 < finished.steps_done < 100_000


@pytest.mark.parametrize("mode", [pb.COHERENCE_MODE_PAUSE_RUN, pb.COHERENCE_MODE_PAUSE_STEP])
def test_steps_that_vllm_was_not_told_of_are_in_the_version_before_their_lease_has_run_out(
    attached: Any, all_events: Events, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    engine, trainer = attached
    leases = engine.engine.leases

    def refuse(*_: Any, **__: Any) -> int:
        raise Unavailable("vLLM did not answer within 30 s.", reason="ENGINE_SLOW")

    monkeypatch.setattr(trainer.sidecar, "resume", refuse)
    events = all_events(trainer.submit(coherence=pb.Coherence(mode=mode)))
    assert "ENGINE_SLOW" in [e.warning.reason for e in events if e.HasField("warning")]
    assert engine.engine.weight_version == 0
    assert finished_of(events).weight_version == trainer.status.weight_version == 1
    leases._deadline = 0.0
    leases._expire(leases._lease_id)
    assert engine.engine.weight_version == trainer.status.weight_version == 1


def test_stopping_ends_the_run_after_its_step_and_saves(
    attached: Any, all_events: Events, start_trainer: Any, wait: Any
) -> None:
    engine, trainer = attached
    log, waiting = trainer.submit(epochs=100_000), trainer.submit()
    wait(lambda: log.sequence > 4, "a step")
    trainer.stop()
    finished = finished_of(all_events(log))
    assert finished.failure.reason == "SERVER_STOPPED"
    with pytest.raises(Unavailable, match="are kept"):
        all_events(waiting)
    assert engine.calls == ["reset caches"]
    again = start_trainer()
    kept = again.queue.log_of(waiting.run_id)
    events = all_events(kept)
    assert events[1].started.optimizer_step == finished.steps_done
    assert finished_of(events).state == pb.RUN_STATE_SUCCEEDED


def test_caches_that_could_not_be_dropped_are_a_warning(
    attached: Any, all_events: Events, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = attached

    async def refuse(*, reset_running_requests: bool) -> bool:
        return False

    monkeypatch.setattr(engine.client, "reset_prefix_cache", refuse)
    events = all_events(trainer.submit())
    assert kinds(events) == ["queued", "started", "step", "warning", "state_saved", "finished"]
    assert events[3].warning.reason == "CACHE_NOT_RESET"
    assert finished_of(events).state == pb.RUN_STATE_SUCCEEDED
    assert not engine.engine.leases.active, "vLLM goes on"


def test_an_engine_that_goes_after_the_last_step_fails_the_run_and_saves_nothing(
    attached: Any, all_events: Events, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = attached
    take_step = steps_module.take_step

    def take_the_last_step(*arguments: Any) -> Any:
        result = take_step(*arguments)
        engine.stop()
        return result

    monkeypatch.setattr(steps_module, "take_step", take_the_last_step)
    events = all_events(trainer.submit(coherence=PAUSE_RUN))
    assert kinds(events) == ["queued", "started", "step", "finished"]
    assert finished_of(events).failure.reason == "ENGINE_LOST"
    assert not list(trainer.settings.state_dir.rglob(FILE_NAME))


def test_who_reads_finished_sees_the_run_gone_from_the_status(
    attached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = attached
    seen = []
    publish = trainer.board.publish

    def look(event: pb.RunEvent) -> None:
        if event.HasField("finished"):
            seen.append((trainer.status.active_run_id, trainer.status.optimizer_step))
        publish(event)

    monkeypatch.setattr(trainer.board, "publish", look)
    log = trainer.submit(epochs=2)
    trainer.stop()
    assert log.ended
    assert seen[0][0] == ""


def test_a_stopping_trainer_takes_neither_runs_nor_syncs(attached: Any) -> None:
    _, trainer = attached
    trainer.stop()
    with pytest.raises(Unavailable, match="stopping"):
        CheckpointJobs(trainer.owner, trainer.board).sync(lambda *_: None)
    with pytest.raises(Unavailable, match="stopping"):
        trainer.submit()
