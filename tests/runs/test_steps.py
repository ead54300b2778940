"""What a spec asks of its steps: coherence, guards, dry runs, losses before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import apollo_trainer.runs.steps as steps_module
from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine.coherence import Coherence

Events = Callable[[Any], list[pb.RunEvent]]
ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
FAST = pb.OptimizerConfig(lr=1e-2)
LIVE = pb.Coherence(mode=pb.COHERENCE_MODE_LIVE)
EACH_STEP = pb.Coherence(
    mode=pb.COHERENCE_MODE_PAUSE_STEP, cache_policy=pb.CACHE_POLICY_RESET_EACH_STEP
)


def sample(*continuation: int, context: tuple[int, ...] = (60, 61, 62)) -> pb.Sample:
    return pb.Sample(tokens=pb.TokenSample(context_ids=context, continuation_ids=continuation))


def steps_of(events: list[pb.RunEvent]) -> list[pb.RunEvent.Step]:
    return [event.step for event in events if event.HasField("step")]


def hashes(engine: Any, trainer: Any) -> dict[str, str]:
    """Of every live weight, and of everything that the Apollo state holds."""
    state, description = trainer.owner.session().optimizer.named_state()
    tensors = engine.model.values() | state
    digests = {
        name: hashlib.sha256(t.detach().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, t in tensors.items()
        if t.numel()
    }
    return digests | {"description": repr(description)}


def options_of(trainer: Any) -> list[dict[str, Any]]:
    groups = trainer.owner.session().optimizer.param_groups
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


def test_a_live_run_never_pauses_vllm_and_counts_each_update(
    attached: Any, all_events: Events
) -> None:
    engine, trainer = attached
    events = all_events(trainer.submit(epochs=3, optimizer=FAST, coherence=LIVE))
    assert engine.calls == ["reset caches"]
    finished = events[-1].finished
    assert finished.state == pb.RUN_STATE_SUCCEEDED
    assert finished.weight_version == engine.engine.weight_version == 3
    assert finished.pause_time.ToNanoseconds() == 0


def test_a_pause_for_each_step_is_told_with_the_step(attached: Any, all_events: Events) -> None:
    engine, trainer = attached
    events = all_events(trainer.submit(epochs=2, coherence=EACH_STEP))
    assert engine.calls == ["pause keep", "reset caches", "resume"] * 2
    held = [step.pause_time.ToNanoseconds() for step in steps_of(events)]
    assert all(nanoseconds > 0 for nanoseconds in held)
    total = events[-1].finished.pause_time.ToNanoseconds()
    assert total == pytest.approx(sum(held), abs=10)


def test_a_step_waits_for_its_turn_and_says_how_long(attached: Any, all_events: Events) -> None:
    _, trainer = attached
    trainer.owner.session().pace.step_ended = lambda: 0.2
    first, second = steps_of(all_events(trainer.submit(epochs=2)))
    assert first.wait_time.ToNanoseconds() < 0.1e9
    assert 0.1e9 < second.wait_time.ToNanoseconds() < 10e9
    (third,) = steps_of(all_events(trainer.submit()))
    assert third.wait_time.ToNanoseconds() > 0, "a new run waits for its turn, too"
    paused = pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_RUN)
    (fourth,) = steps_of(all_events(trainer.submit(coherence=paused)))
    assert fourth.wait_time.ToNanoseconds() == 0, "vLLM makes no token meanwhile"


def test_a_cancelled_run_waits_for_no_turn(attached: Any, all_events: Events, wait: Any) -> None:
    _, trainer = attached
    trainer.owner.session().pace.step_ended = lambda: 3600.0
    log = trainer.submit(epochs=2)
    wait(lambda: log.sequence >= 3, "the first step")
    trainer.queue.cancel(log.run_id)
    finished = all_events(log)[-1].finished
    assert (finished.state, finished.steps_done) == (pb.RUN_STATE_CANCELLED, 1)


def test_a_step_that_vllm_was_not_told_of_is_a_warning_and_told_no_second_time(
    attached: Any, all_events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = attached

    async def refuse(*, reset_running_requests: bool) -> bool:
        return False

    monkeypatch.setattr(engine.client, "reset_prefix_cache", refuse)
    events = all_events(trainer.submit(epochs=2, coherence=EACH_STEP))
    warnings = [event.warning.reason for event in events if event.HasField("warning")]
    assert warnings == ["CACHE_NOT_RESET"] * 3
    assert engine.engine.weight_version == 2
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert not engine.engine.leases.active


@pytest.mark.parametrize("reset", [False, True])
def test_a_dry_run_changes_no_byte_of_weights_and_state(
    attached: Any, all_events: Events, reset: bool
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    before, options, calls = hashes(engine, trainer), options_of(trainer), list(engine.calls)
    asked = pb.OptimizerConfig(lr=0.5, beta1=0.5, warmup_steps=3, reset_optimizer=reset)
    if reset:
        asked.rank, asked.rounding = 4, pb.ROUNDING_NEAREST
    events = all_events(trainer.submit(epochs=3, optimizer=asked, dry_run=True))
    assert hashes(engine, trainer) == before
    assert options_of(trainer) == options
    assert engine.calls == calls
    assert trainer.status.optimizer_step == trainer.status.weight_version == 2
    assert trainer.owner.session().shape.rank == 8
    steps = steps_of(events)
    assert all(step.dry_run and step.update_norm > 0 for step in steps)
    assert len({step.loss for step in steps}) == 1
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert events[-1].finished.steps_done == 0


def test_a_dry_run_foretells_the_step_that_the_run_takes(attached: Any, all_events: Events) -> None:
    _, trainer = attached
    dry, real = (
        steps_of(all_events(trainer.submit(optimizer=FAST, dry_run=dry)))[0]
        for dry in (True, False)
    )
    for name in ("loss", "grad_norm", "update_norm", "learning_rate", "changed_fraction"):
        assert getattr(dry, name) == pytest.approx(getattr(real, name), rel=1e-6)


def test_a_restart_counts_no_step_of_a_dry_run(
    attached: Any, all_events: Events, start_trainer: Any
) -> None:
    _, trainer = attached
    all_events(trainer.submit(epochs=2))
    log = trainer.submit(epochs=5, dry_run=True, optimizer=pb.OptimizerConfig(reset_optimizer=True))
    all_events(log)
    assert trainer.queue.ledger.run(log.run_id).steps_done == 0
    trainer.stop()
    again = start_trainer()
    again.wait_for(ATTACHED)
    assert all_events(again.submit())[1].started.optimizer_step == 2


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        (pb.Guard(max_loss=0.1), "GUARD_MAX_LOSS"),
        (pb.Guard(max_grad_norm=1e-6), "GUARD_MAX_GRAD_NORM"),
        (pb.Guard(max_update_ratio=1e-9), "GUARD_MAX_UPDATE_RATIO"),
    ],
)
def test_nothing_is_written_once_a_guard_fires(
    attached: Any, all_events: Events, guard: pb.Guard, reason: str
) -> None:
    engine, trainer = attached
    before = hashes(engine, trainer)
    finished = all_events(trainer.submit(epochs=3, guard=guard))[-1].finished
    assert (finished.state, finished.failure.reason) == (pb.RUN_STATE_FAILED, reason)
    assert finished.steps_done == engine.engine.weight_version == 0
    after = hashes(engine, trainer)
    assert {n: d for n, d in after.items() if n != "description"} == {
        n: d for n, d in before.items() if n != "description"
    }
    assert not engine.engine.leases.active


TWO = [sample(70, 71, 72), sample(80, 81, context=(40, 41))]


@pytest.mark.parametrize("seed", [None, 3], ids=["in order", "shuffled"])
def test_a_run_ends_well_once_every_sample_is_learned(
    attached: Any, all_events: Events, kinds: Any, seed: int | None
) -> None:
    engine, trainer = attached
    spec = {"samples": TWO, "epochs": 60, "optimizer": FAST, "evaluate": True, "seed": seed}
    spec |= {"coherence": pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_STEP)}
    events = all_events(trainer.submit(**spec, guard=pb.Guard(min_loss=0.5)))
    losses, finished = [step.loss for step in steps_of(events)], events[-1].finished
    assert (finished.state, finished.stopped.reason) == (pb.RUN_STATE_SUCCEEDED, "GUARD_MIN_LOSS")
    assert f"{len(losses)} of 120 steps" in finished.stopped.message
    assert finished.steps_done == engine.engine.weight_version == len(losses) < 100
    # A lucky step ends nothing: the last one was below, and one before it was not.
    assert losses[-1] < 0.5 <= max(losses[:-1])
    (_, after) = (event.evaluated for event in events if event.HasField("evaluated"))
    assert max(after.losses) < 0.5
    assert kinds(events)[-3:] == ["evaluated", "state_saved", "finished"]
    assert engine.calls.count("pause keep") == engine.calls.count("resume") == len(losses)
    assert engine.calls[-1] == "reset caches"
    again = all_events(
        trainer.submit(samples=TWO, samples_per_step=2, guard=pb.Guard(min_loss=0.5))
    )
    assert again[-1].finished.stopped.reason == "GUARD_MIN_LOSS"
    assert (again[-1].finished.steps_done, steps_of(again)) == (0, [])


def test_by_default_a_run_ends_at_a_loss_of_zero_and_a_guard_of_0_takes_every_step(
    attached: Any, all_events: Events
) -> None:
    _, trainer = attached
    spec = {"samples": TWO, "samples_per_step": 2, "epochs": 60, "optimizer": FAST}
    events = all_events(trainer.submit(**spec, guard=pb.Guard()))
    assert events[-1].finished.stopped.reason == "GUARD_MIN_LOSS"
    assert 0.02 <= min(step.loss for step in steps_of(events)) < 0.5
    spec |= {"epochs": 5}
    for way in ({"guard": pb.Guard(min_loss=0)}, {"dry_run": True}):
        events = all_events(trainer.submit(**spec, **way))
        assert len(steps_of(events)) == 5
        assert not events[-1].finished.HasField("stopped")


def test_a_run_tells_each_samples_loss_before_and_after(
    attached: Any, all_events: Events, kinds: Any
) -> None:
    _, trainer = attached
    samples = [sample(70, 71, 72), sample(80, 81), sample(90, context=(40, 41))]
    events = all_events(trainer.submit(samples=samples, epochs=20, optimizer=FAST, evaluate=True))
    first, last = (event.evaluated for event in events if event.HasField("evaluated"))
    assert not first.after_training and last.after_training
    assert len(first.losses) == len(last.losses) == 3
    assert all(after < before for before, after in zip(first.losses, last.losses, strict=True))
    assert steps_of(events)[0].loss == pytest.approx(first.losses[0], rel=1e-5)
    order = kinds(events)
    assert order.index("evaluated") < order.index("step")


def test_a_step_says_when_it_made_gradients(
    start_engine: Any, start_trainer: Any, all_events: Events
) -> None:
    start_engine()
    trainer = start_trainer(token_budget=4)
    trainer.wait_for(ATTACHED)
    samples = [sample(70, 71, 72, 73), sample(80, 81, 82, 83)]
    (step,) = steps_of(all_events(trainer.submit(samples=samples, samples_per_step=2)))
    assert step.micro_batches == 2
    assert step.full_gradients == pb.FULL_GRADIENTS_UNSPECIFIED
    long = [sample(*range(70, 110))]
    (step,) = steps_of(all_events(trainer.submit(samples=long)))
    assert step.full_gradients == pb.FULL_GRADIENTS_LONG_STEP
    (one,) = steps_of(all_events(trainer.submit(samples=samples[:1])))
    assert one.micro_batches == 1


def test_a_run_is_cancelled_between_two_micro_batches_and_its_step_not_written(
    start_engine: Any,
    start_trainer: Any,
    all_events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, trainer = start_engine(), start_trainer(token_budget=4)
    trainer.wait_for(ATTACHED)
    before = hashes(engine, trainer)
    take_step, seen = steps_module.take_step, []

    def counting(
        model: Any, optimizer: Any, samples: Any, policy: Any, before_batch: Any, *rest: Any
    ) -> Any:
        def look() -> None:
            seen.append(len(seen))
            if len(seen) == 2:
                trainer.queue.cancel(log.run_id)
            before_batch()

        return take_step(model, optimizer, samples, policy, look, *rest)

    monkeypatch.setattr(steps_module, "take_step", counting)
    many = [sample(70, 71, 72, 73 + n) for n in range(8)]
    log = trainer.submit(samples=many, samples_per_step=8)
    finished = all_events(log)[-1].finished
    assert (finished.state, finished.steps_done) == (pb.RUN_STATE_CANCELLED, 0)
    assert len(seen) == 2
    after = hashes(engine, trainer)
    del before["description"], after["description"]
    assert after == before


FORBIDDEN = [
    FailedPrecondition("vLLM went on early", reason="PAUSE_LOST"),
    Unavailable("vLLM does not answer", reason="ENGINE_SLOW"),
    OSError(28, "No space left on device"),
]


def test_what_forbids_a_write_is_told_as_what_it_is_and_touches_no_byte(
    start_engine: Any,
    start_trainer: Any,
    all_events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, trainer = start_engine(), start_trainer()
    trainer.wait_for(ATTACHED)
    all_events(trainer.submit())
    checkpoints, before = trainer.owner.session().checkpoints, hashes(engine, trainer)

    def forbid(*_: Any) -> None:
        raise error

    for error in FORBIDDEN:
        with monkeypatch.context() as patched:
            if isinstance(error, OSError):
                # After the copies for an undo of the first tensor.
                patched.setattr(checkpoints.watch, "_watchers", [*checkpoints.watch._watchers])
                checkpoints.watch.add(forbid)
            else:
                patched.setattr(Coherence, "before_write", forbid)
            finished = all_events(trainer.submit())[-1].finished
        assert finished.failure.reason == getattr(error, "reason", "STEP_NOT_WRITTEN")
        assert "restart vLLM" not in finished.failure.message
        assert finished.steps_done == 0
        after = hashes(engine, trainer)
        assert after | {"description": ""} == before | {"description": ""}
        assert len(checkpoints.ring) == 1, "no update that did nothing can be taken back"
    assert all_events(trainer.submit())[-1].finished.state == pb.RUN_STATE_SUCCEEDED
