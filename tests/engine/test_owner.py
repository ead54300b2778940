"""The owner against a real sidecar on a unix socket: attach, lose, attach again, refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import apollo_trainer.engine.owner as owner_module
from apollo_grpc.errors import FailedPrecondition, ResourceExhausted, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine.open_session import open_session
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from apollo_trainer.optim import Apollo
from tests.waiting import HANG

ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
DETACHED = status_pb2.ATTACHMENT_STATE_DETACHED
REFUSED = status_pb2.ATTACHMENT_STATE_REFUSED
Start = Callable[..., Any]
Events = Callable[[Any], list[pb.RunEvent]]
FAST = pb.OptimizerConfig(lr=1e-2)


def test_an_attached_trainer_says_what_it_holds(attached: Any, model_folder: Any) -> None:
    engine, trainer = attached
    status, weights = trainer.status, engine.model.values()
    assert status.model == str(model_folder)
    assert status.engine_epoch == engine.engine.epoch
    assert status.weight_memory.parameters == sum(t.numel() for t in weights.values())
    assert status.weight_memory.shared_bytes == sum(t.nbytes for t in weights.values())
    assert status.weight_memory.copied_bytes == 0
    assert status.logprob_difference < 1e-4
    assert status.optimizer_loaded
    assert status.state_size_bytes > 0
    assert engine.calls == []


def test_slow_steps_are_told_once_in_the_log_and_in_the_status(
    start_engine: Start,
    start_trainer: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Apollo, "slowness", lambda _: "Steps are slow: by plain torch.")
    start_engine()
    detail = start_trainer().wait_for(ATTACHED).attachment_detail
    assert detail.endswith(" Steps are slow: by plain torch.")
    assert caplog.text.count("Steps are slow") == 1


def test_a_trainer_waits_for_its_engine(start_engine: Start, start_trainer: Start) -> None:
    trainer = start_trainer()
    with pytest.raises(Unavailable, match="no engine yet") as caught:
        trainer.submit()
    assert caught.value.reason == "ENGINE_NOT_ATTACHED"
    engine = start_engine()
    assert trainer.wait_for(ATTACHED).engine_epoch == engine.engine.epoch


def test_another_model_than_the_mapped_one_is_refused(
    start_engine: Start, start_trainer: Start
) -> None:
    start_engine(scores_wrong_by=0.5)
    trainer = start_trainer()
    assert "LOGPROBS_DISAGREE" in trainer.wait_for(REFUSED).attachment_detail
    with pytest.raises(FailedPrecondition, match="vLLM does not compute") as caught:
        trainer.submit()
    assert caught.value.reason == "ATTACHMENT_REFUSED"


def test_a_directory_that_holds_other_weights_is_refused(
    start_engine: Start, start_trainer: Start, model_folder: Any
) -> None:
    start_engine()
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 7.0
    save_file(tensors, file, metadata={"format": "pt"})
    trainer = start_trainer()
    detail = trainer.wait_for(REFUSED).attachment_detail
    assert "model.norm.weight" in detail
    assert "VALUES_DIFFER" in detail


def test_of_refused_parameters_three_are_named_and_log_and_status_have_all(
    start_engine: Start,
    start_trainer: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = start_engine()
    # As vLLM's own loader words it, in one line of all its parameters.
    known = ", ".join(repr(f"model.language_model.layers.{n}.weight") for n in range(109))
    error = ValueError(f"There is no module named 'model' in Some. The available ones: {{{known}}}")

    def load(tensors: Any) -> None:
        raise error

    monkeypatch.setattr(engine.model, "load_weights", load)
    status = start_trainer().wait_for(REFUSED)
    names = [refused.name for refused in status.weight_map.refused]
    assert len(names) == status.weight_map.parameters > 3
    detail = status.attachment_detail
    assert "There is no module named 'model' in Some" in detail
    assert "PARAMETER_REFUSED" in detail
    assert sum(name in detail for name in names) == 3
    assert f"and {len(names) - 3} more" in detail
    assert len(detail) < 600
    assert all(known in refused.reason for refused in status.weight_map.refused)
    assert all(f"{name}: " in caplog.text for name in names)


def test_of_a_directory_that_changed_three_tensors_are_named_and_the_status_has_all(
    start_engine: Start, start_trainer: Start, model_folder: Any
) -> None:
    start_engine()
    file = model_folder / "model.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    status = start_trainer().wait_for(REFUSED)
    assert {refused.name for refused in status.weight_map.refused} == set(changed)
    assert sum(f"{name} (" in status.attachment_detail for name in changed) == 3


def test_trained_weights_that_the_directory_does_not_hold_are_attached_again(
    attached: Any, start_trainer: Start, all_events: Events
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(optimizer=FAST))
    trainer.stop()
    assert start_trainer().wait_for(ATTACHED).engine_epoch == engine.engine.epoch


def test_an_engine_that_stops_in_mid_run_fails_the_run_and_a_new_one_is_found(
    attached: Any, start_engine: Start, all_events: Events, wait: Start, kinds: Start
) -> None:
    engine, trainer = attached
    log = trainer.submit(epochs=100_000)
    wait(lambda: log.sequence > 4, "the third step")
    engine.stop()
    finished = all_events(log)[-1].finished
    assert finished.state == pb.RUN_STATE_FAILED
    assert finished.failure.reason == "ENGINE_LOST"
    assert 0 < finished.steps_done < 100_000
    assert "state_saved" not in kinds(all_events(log))
    assert "start vLLM" in trainer.wait_for(DETACHED).attachment_detail
    wait(lambda: not trainer.status.active_run_id, "the end of the run")
    assert not trainer.status.optimizer_loaded
    with pytest.raises(Unavailable):
        trainer.submit()

    new = start_engine()
    assert trainer.wait_for(ATTACHED, new.engine.epoch).optimizer_step == 0
    assert all_events(trainer.submit())[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_a_run_that_waited_while_the_engine_went_never_begins(
    attached: Any, all_events: Events, wait: Start, kinds: Start
) -> None:
    engine, trainer = attached
    first = trainer.submit(epochs=100_000)
    second = trainer.submit()
    wait(lambda: first.sequence > 3, "a step")
    engine.stop()
    events = all_events(second)
    assert kinds(events) == ["queued", "finished"]
    assert events[-1].finished.failure.reason == "ENGINE_LOST"


def test_a_dropped_connection_to_a_living_engine_is_mended(
    attached: Any, all_events: Events, wait: Start
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(optimizer=FAST))
    engine.drop_connections()
    wait(lambda: trainer.status.attachment != ATTACHED, "the loss")
    assert trainer.wait_for(ATTACHED, engine.engine.epoch).optimizer_step == 1
    assert all_events(trainer.submit())[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_an_engine_lost_while_attaching_is_not_shown_as_attached(
    attached: Any, wait: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = attached
    opened: list[int] = []

    def lose_the_engine_and_open(*arguments: Any) -> Any:
        trainer.owner.engine_lost("vLLM is gone.")
        opened.append(1)
        return open_session(*arguments)

    monkeypatch.setattr(owner_module, "open_session", lose_the_engine_and_open)
    engine.drop_connections()
    wait(lambda: opened, "the second attachment")
    assert isinstance(
        CheckpointJobs(trainer.owner, trainer.board).sync(print).exception(timeout=HANG),
        Unavailable,
    )
    # It may be looked for again already.
    assert trainer.status.attachment != ATTACHED


def test_split16_on_half_precision_is_refused_and_the_state_stays_usable(
    start_engine: Start, start_trainer: Start, all_events: Events
) -> None:
    start_engine(dtype=torch.float16)
    trainer = start_trainer()
    trainer.wait_for(ATTACHED)
    asked = pb.OptimizerConfig(rounding=pb.ROUNDING_SPLIT16, reset_optimizer=True)
    finished = all_events(trainer.submit(optimizer=asked))[-1].finished
    assert finished.failure.reason == "OPTIMIZER_UNSUITABLE"
    assert "float16" in finished.failure.message
    assert all_events(trainer.submit())[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    trainer.stop()
    assert start_trainer().wait_for(ATTACHED).optimizer_step == 1


def test_the_state_is_restored_by_a_new_trainer_and_its_steps_go_on(
    attached: Any, start_trainer: Start, all_events: Events
) -> None:
    _, trainer = attached
    all_events(trainer.submit(epochs=3, optimizer=FAST))
    saved = {n: t.clone() for n, t in trainer.owner.session().optimizer.named_state()[0].items()}
    trainer.stop()
    again = start_trainer(rank=4)
    assert again.wait_for(ATTACHED).optimizer_step == 3
    restored = again.owner.session().optimizer.named_state()[0]
    assert all(torch.equal(restored[name], tensor) for name, tensor in saved.items())
    events = all_events(again.submit(optimizer=FAST))
    assert events[1].started.optimizer_step == 3
    assert events[2].step.optimizer_step == 4


def test_another_rank_is_refused_and_a_reset_is_taken(
    attached: Any, all_events: Events, wait: Start
) -> None:
    _, trainer = attached
    all_events(trainer.submit())
    size = trainer.status.state_size_bytes
    with pytest.raises(FailedPrecondition, match="rank 8") as caught:
        trainer.submit(optimizer=pb.OptimizerConfig(rank=4))
    assert caught.value.reason == "OPTIMIZER_MISMATCH"
    asked = pb.OptimizerConfig(rank=4, reset_optimizer=True)
    events = all_events(trainer.submit(optimizer=asked))
    assert events[1].started.optimizer_step == 0
    wait(lambda: trainer.status.state_size_bytes < size, "the smaller state")
    all_events(trainer.submit(optimizer=pb.OptimizerConfig(rank=4)))


def test_a_full_queue_refuses_and_the_waiting_runs_are_all_served(
    start_engine: Start, start_trainer: Start, all_events: Events, wait: Start
) -> None:
    start_engine()
    trainer = start_trainer(max_queued_runs=2)
    trainer.wait_for(ATTACHED)
    runs = [trainer.submit(epochs=30)]
    wait(lambda: trainer.status.active_run_id, "the first run")
    runs += [trainer.submit(), trainer.submit()]
    with pytest.raises(ResourceExhausted, match="2 runs are waiting") as caught:
        trainer.submit()
    assert caught.value.metadata == {"limit": "2"}
    assert trainer.status.queue_length == 2
    ended = [all_events(run) for run in runs]
    assert [e[0].queued.position for e in ended] == [0, 1, 2]
    assert all(e[-1].finished.state == pb.RUN_STATE_SUCCEEDED for e in ended)
    assert trainer.status.queue_length == 0
