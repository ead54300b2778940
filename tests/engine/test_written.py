"""After each run that wrote, both sides score the same tokens; who stayed behind is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import state_of
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from tests.waiting import HANG

Events = Callable[[Any], list[pb.RunEvent]]
REFUSED = status_pb2.ATTACHMENT_STATE_REFUSED
FAST = pb.OptimizerConfig(lr=1e-2)
COPIES = ("*mlp*",)
MODES = [pb.COHERENCE_MODE_PAUSE_RUN, pb.COHERENCE_MODE_PAUSE_STEP, pb.COHERENCE_MODE_LIVE]


def finished(events: list[pb.RunEvent]) -> pb.RunEvent.Finished:
    return events[-1].finished


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_copies_after_the_attach_fails_the_run(
    attached: Any, all_events: Events, mode: Any
) -> None:
    engine, trainer = attached
    engine.model.keep_copies(COPIES)
    ended = finished(
        all_events(trainer.submit(epochs=10, optimizer=FAST, coherence=pb.Coherence(mode=mode)))
    )
    assert ended.state == pb.RUN_STATE_FAILED
    assert ended.failure.reason == "WEIGHTS_NOT_LIVE"
    assert "Restart vLLM" in ended.failure.message
    assert ended.steps_done == 10
    assert not engine.engine.leases.active


def test_nothing_more_is_written_synced_exported_or_kept(
    attached: Any, all_events: Events, model_folder: Path, tmp_path: Path, state_dir: Path
) -> None:
    engine, trainer = attached
    before = {path: path.read_bytes() for path in model_folder.iterdir()}
    engine.model.keep_copies(COPIES)
    all_events(trainer.submit(epochs=10, optimizer=FAST))
    written = engine.model.values()
    jobs = CheckpointJobs(trainer.owner, trainer.board)
    for job in (
        jobs.sync(print),
        jobs.export(tmp_path / "out", print),
        jobs.snapshot("name", print),
        jobs.undo(1, None),
    ):
        with pytest.raises(FailedPrecondition, match=r"(?s)does not compute .*Restart vLLM"):
            job.result(timeout=HANG)
    assert {path: path.read_bytes() for path in model_folder.iterdir()} == before
    with pytest.raises(FailedPrecondition, match="does not compute"):
        trainer.submit()
    assert "WEIGHTS_NOT_LIVE" in trainer.wait_for(REFUSED).attachment_detail
    trainer.stop()
    assert all(torch.equal(written[n], t) for n, t in engine.model.values().items())
    assert not any(state_of(p).epoch for p in state_dir.glob("models/*/apollo_state.safetensors"))


def test_a_run_that_waited_behind_it_writes_nothing(attached: Any, all_events: Events) -> None:
    engine, trainer = attached
    engine.model.keep_copies(COPIES)
    first = trainer.submit(epochs=30, optimizer=FAST)
    second = trainer.submit(optimizer=FAST)
    assert finished(all_events(first)).failure.reason == "WEIGHTS_NOT_LIVE"
    ended = finished(all_events(second))
    assert (ended.failure.reason, ended.steps_done) == ("WEIGHTS_NOT_LIVE", 0)


def test_a_cancelled_run_is_compared_as_well(attached: Any, all_events: Events, wait: Any) -> None:
    engine, trainer = attached
    engine.model.keep_copies(COPIES)
    log = trainer.submit(epochs=100_000, optimizer=FAST)
    wait(lambda: log.sequence > 20, "some steps")
    trainer.queue.cancel(log.run_id)
    assert finished(all_events(log)).failure.reason == "WEIGHTS_NOT_LIVE"


def test_the_engine_is_not_attached_again_and_by_a_new_server_is_refused(
    attached: Any, all_events: Events, start_trainer: Any, wait: Any
) -> None:
    engine, trainer = attached
    engine.model.keep_copies(COPIES)
    all_events(trainer.submit(epochs=10, optimizer=FAST))
    engine.drop_connections()
    wait(lambda: "mlp" in trainer.wait_for(REFUSED).attachment_detail or True, "the refusal")
    trainer.stop()
    detail = start_trainer().wait_for(REFUSED).attachment_detail
    assert "LOGPROBS_DISAGREE" in detail or "WEIGHTS_NOT_LIVE" in detail


def test_a_new_engine_is_attached_after_one_that_was_not_live(
    attached: Any, all_events: Events, start_engine: Any
) -> None:
    engine, trainer = attached
    engine.model.keep_copies(COPIES)
    all_events(trainer.submit(epochs=10, optimizer=FAST))
    engine.stop()
    new = start_engine()
    trainer.wait_for(status_pb2.ATTACHMENT_STATE_ATTACHED, new.engine.epoch)
    assert finished(all_events(trainer.submit())).state == pb.RUN_STATE_SUCCEEDED


def test_an_engine_that_does_not_score_is_told_and_fails_no_run(
    attached: Any, all_events: Events, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = attached

    def slow(*arguments: Any) -> Any:
        raise Unavailable("vLLM did not answer within 30 s.", reason="ENGINE_SLOW")

    monkeypatch.setattr(trainer.sidecar, "score", slow)
    events = all_events(trainer.submit())
    assert kinds(events) == ["queued", "started", "step", "warning", "state_saved", "finished"]
    assert events[3].warning.reason == "LIVENESS_NOT_COMPARED"
    assert finished(events).state == pb.RUN_STATE_SUCCEEDED


def test_rounding_is_measured_anew_where_both_sides_are_further_apart_than_when_attached(
    attached: Any, all_events: Events
) -> None:
    _, trainer = attached
    # Closer than any two computations are.
    trainer.owner.session().attachment.allowed = torch.tensor(-1.0)
    assert finished(all_events(trainer.submit())).state == pb.RUN_STATE_SUCCEEDED


def test_a_dry_run_compares_nothing(
    attached: Any, all_events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = attached

    def asked(*arguments: Any) -> Any:
        raise AssertionError("nothing was written")

    monkeypatch.setattr(trainer.sidecar, "score", asked)
    assert finished(all_events(trainer.submit(dry_run=True))).state == pb.RUN_STATE_SUCCEEDED
