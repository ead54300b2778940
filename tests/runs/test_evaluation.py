"""What a run computes beside cross-entropy, and what it tells of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from tests.waiting import HANG

Events = Callable[[Any], list[pb.RunEvent]]
FAST = pb.OptimizerConfig(lr=1e-2)


def sample(context: list[int], continuation: list[int], **fields: Any) -> pb.Sample:
    tokens = pb.TokenSample(context_ids=context, continuation_ids=continuation)
    return pb.Sample(tokens=tokens, **fields)


LEARNED = sample([60, 61, 62], [70, 71, 72, 73])
KEPT = sample([60, 61], [9, 10, 11])


def steps(events: list[pb.RunEvent]) -> list[pb.RunEvent.Step]:
    return [event.step for event in events if event.HasField("step")]


def told(events: list[pb.RunEvent]) -> list[pb.RunEvent.Evaluated]:
    return [event.evaluated for event in events if event.HasField("evaluated")]


def succeeded(events: list[pb.RunEvent]) -> list[pb.RunEvent]:
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED, events[-1].finished
    return events


def test_an_anchor_is_at_zero_at_first_and_moves_less_the_more_it_weighs(
    attached: Any, all_events: Events
) -> None:
    _, trainer = attached
    found = []
    for weight in (1e-6, 1.0, 30.0):
        anchors = pb.Anchors(samples=[KEPT], weight=weight)
        events = succeeded(all_events(trainer.submit(epochs=20, optimizer=FAST, anchors=anchors)))
        assert steps(events)[0].anchor_loss == pytest.approx(0, abs=1e-5)
        found += told(events)[-1].anchor_losses
        CheckpointJobs(trainer.owner, trainer.board).undo(20, None).result(HANG)
    assert found[0] > 2 * found[1] > 4 * found[2]


def test_a_step_tells_its_epoch_and_each_samples_loss(attached: Any, all_events: Events) -> None:
    _, trainer = attached
    samples = [LEARNED, KEPT, sample([1, 2], [3])]
    events = all_events(trainer.submit(samples=samples, samples_per_step=2, epochs=2, seed=5))
    found = steps(succeeded(events))
    assert [step.epoch for step in found] == [0, 0, 1, 1]
    for epoch in (0, 1):
        indices = [i for step in found if step.epoch == epoch for i in step.sample_indices]
        assert sorted(indices) == [0, 1, 2]
    for step in found:
        tokens = [len(samples[i].tokens.continuation_ids) for i in step.sample_indices]
        total = sum(a * n for a, n in zip(step.sample_losses, tokens, strict=True))
        assert total == pytest.approx(step.loss_sum, rel=1e-4)


def test_evaluation_samples_are_told_and_not_learned(attached: Any, all_events: Events) -> None:
    _, trainer = attached
    spec: dict[str, Any] = {"epochs": 6, "optimizer": FAST, "evaluation_samples": [KEPT]}
    events = succeeded(all_events(trainer.submit(evaluate_every_steps=2, **spec)))
    assert [each.step for each in told(events)] == [0, 2, 4, 6]
    assert [each.after_training for each in told(events)] == [False, False, False, True]
    assert all(len(each.evaluation_losses) == 1 and not each.losses for each in told(events))
    assert all(list(step.sample_indices) == [0] for step in steps(events))


def test_a_distilled_context_is_known_without_it(attached: Any, all_events: Events) -> None:
    _, trainer = attached
    taught = sample([60, 61, 62], [70, 71, 72, 73])
    taught.tokens.teacher_context_ids.extend([5, 6, 7, 60, 61, 62])
    spec: dict[str, Any] = {
        "samples": [taught],
        "context_distillation": pb.ContextDistillation(top_k=100),
        "optimizer": FAST,
        "epochs": 30,
    }
    found = steps(succeeded(all_events(trainer.submit(**spec))))
    assert all(step.loss >= 0 for step in found)
    assert found[-1].loss < 0.3 * found[0].loss


def test_a_policy_gradient_raises_what_was_better_than_expected(
    attached: Any, all_events: Events
) -> None:
    engine, trainer = attached
    before = log_probability(engine)
    judged = sample([60, 61, 62], [70, 71], advantages=[1.0], sampler_log_probabilities=before)
    spec: dict[str, Any] = {"samples": [judged], "policy_gradient": pb.PolicyGradient()}
    events = all_events(trainer.submit(epochs=3, optimizer=pb.OptimizerConfig(lr=1e-5), **spec))
    first, *_, last = steps(succeeded(events))
    assert first.loss == pytest.approx(-1, abs=1e-3)
    assert first.policy.mean_ratio == pytest.approx(1, abs=1e-3)
    assert (first.policy.clipped_fraction, last.policy.clipped_fraction) == (0, 0)
    assert sum(log_probability(engine)) > sum(before)
    assert last.policy.mean_ratio > 1


def log_probability(engine: Any) -> list[float]:
    ids = torch.tensor([[60, 61, 62, 70, 71]])
    logits = engine.model.module(ids).logits[0].float().log_softmax(-1)
    return [float(logits[2 + n, token]) for n, token in enumerate((70, 71))]


def test_what_is_left_out_does_not_learn(attached: Any, all_events: Events) -> None:
    engine, trainer = attached
    before = engine.model.values()
    only = pb.ParameterFilter(include=["*.mlp.*"], layers=[0])
    succeeded(all_events(trainer.submit(epochs=3, optimizer=FAST, parameters=only)))
    changed = {n for n, t in engine.model.values().items() if not torch.equal(t, before[n])}
    assert changed
    assert all("layers.0.mlp" in name for name in changed)
    nothing = pb.ParameterFilter(include=["nothing"])
    events = all_events(trainer.submit(parameters=nothing))
    assert events[-1].finished.failure.reason == "NO_PARAMETERS"


def test_a_schedule_ends_where_it_says(attached: Any, all_events: Events) -> None:
    _, trainer = attached
    linear = pb.OptimizerConfig(lr=1e-3, schedule=pb.SCHEDULE_LINEAR, warmup_steps=1)
    rates = [s.learning_rate for s in steps(all_events(trainer.submit(epochs=5, optimizer=linear)))]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5e-3
    # A later run is told nothing of it.
    assert steps(all_events(trainer.submit(optimizer=FAST)))[0].learning_rate == 1e-2


def test_the_regression_set_is_an_anchor_where_it_is_asked(
    attached: Any, all_events: Events
) -> None:
    _, trainer = attached
    asked = pb.Probe(name="kept", sample=KEPT, check=pb.PROBE_CHECK_EXACT)
    trainer.queue.regression_set().add([asked])
    events = succeeded(all_events(trainer.submit(anchors=pb.Anchors(regression_set=True))))
    assert len(told(events)[-1].anchor_losses) == 1
    assert steps(events)[0].HasField("anchor_loss")
