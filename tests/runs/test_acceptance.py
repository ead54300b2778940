"""A run that is kept only if its probes say so: accepted, or taken back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_grpc.errors import Unavailable
from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from tests.waiting import HANG, wait_until

Events = Callable[[Any], list[pb.RunEvent]]
FAST = pb.OptimizerConfig(lr=1e-2)
PROMPT, ANSWER = [60, 61, 62], [70, 71, 72, 73]


def probe(prompt: list[int], answer: list[int], **fields: Any) -> pb.Probe:
    tokens = pb.TokenSample(context_ids=prompt, continuation_ids=answer)
    fields.setdefault("check", pb.PROBE_CHECK_EXACT)
    return pb.Probe(sample=pb.Sample(tokens=tokens), **fields)


LEARNED = probe(PROMPT, ANSWER, name="learned")
IMPOSSIBLE = probe([1, 2], [3, 4, 5, 6, 7, 8, 9, 10], name="impossible")


def live(engine: Any, trainer: Any) -> dict[str, torch.Tensor]:
    """Weights, moments and step."""
    state, description = trainer.owner.session().optimizer.named_state()
    values = {name: tensor.clone() for name, tensor in state.items()} | engine.model.values()
    return values | {"step": torch.tensor(description["step_count"])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def undo(trainer: Any, updates: int) -> None:
    CheckpointJobs(trainer.owner, trainer.board).undo(updates, None).result(HANG)


def probed(events: list[pb.RunEvent]) -> list[pb.RunEvent.Probed]:
    return [event.probed for event in events if event.HasField("probed")]


def test_an_accepted_run_is_kept_and_its_probe_is_asked_of_later_ones(
    attached: Any, all_events: Events
) -> None:
    _, trainer = attached
    events = all_events(
        trainer.submit(epochs=40, optimizer=FAST, probes=[LEARNED], accept_if=pb.AcceptIf())
    )
    assert events[-1].finished.failure.reason == "", events[-1].finished
    before, after = probed(events)
    assert not before.results[0].passed
    assert after.results[0].passed
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert events[-1].finished.steps_done == trainer.status.optimizer_step == 40
    assert [each.name for each in trainer.queue.regression_set().probes()] == ["learned"]
    later = all_events(trainer.submit(accept_if=pb.AcceptIf(max_lost=1)))
    (result,) = probed(later)[0].results
    assert (result.name, result.regression, result.role) == ("learned", True, pb.PROBE_ROLE_KEEP)


def test_a_rejected_run_leaves_weights_moments_and_step_as_they_were(
    attached: Any, all_events: Events
) -> None:
    engine, trainer = attached
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    before, version = live(engine, trainer), trainer.status.weight_version
    events = all_events(
        trainer.submit(epochs=3, optimizer=FAST, probes=[IMPOSSIBLE], accept_if=pb.AcceptIf())
    )
    finished = events[-1].finished
    assert finished.state == pb.RUN_STATE_REJECTED
    assert finished.failure.reason == "PROBES_FAILED"
    assert "impossible" in finished.failure.message
    assert finished.steps_done == 0
    assert same(live(engine, trainer), before)
    assert trainer.status.optimizer_step == 2
    # Three updates and the one that took them back: no version names two values of the weights.
    assert finished.weight_version == trainer.status.weight_version == version + 4
    assert not trainer.queue.regression_set().probes()
    marks = trainer.settings.state_dir
    wait_until(lambda: not list(marks.glob("models/*/way-back.json")), "the end of the mark")
    # It goes on as if the run had not been.
    assert all_events(trainer.submit(optimizer=FAST))[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_after_a_rejected_run_steps_are_what_they_would_have_been(
    start_engine: Any, start_trainer: Any, all_events: Events
) -> None:
    """One server with a rejected run between, one without."""
    engine, trainer = start_engine(), start_trainer()
    wait_until(lambda: trainer.owner.live_session is not None, "the attachment")
    all_events(trainer.submit(epochs=2, optimizer=FAST))
    snapshot = live(engine, trainer)
    straight = losses(all_events(trainer.submit(epochs=3, optimizer=FAST)))
    undo(trainer, 3)
    assert same(live(engine, trainer), snapshot)
    rejected = trainer.submit(
        epochs=5, optimizer=FAST, probes=[IMPOSSIBLE], accept_if=pb.AcceptIf()
    )
    assert all_events(rejected)[-1].finished.state == pb.RUN_STATE_REJECTED
    assert losses(all_events(trainer.submit(epochs=3, optimizer=FAST))) == straight


def losses(events: list[pb.RunEvent]) -> list[float]:
    return [event.step.loss for event in events if event.HasField("step")]


def test_a_lost_probe_rejects_and_one_that_never_passed_does_not(
    attached: Any, all_events: Events
) -> None:
    engine, trainer = attached
    question = export_pb.Prompt(token_ids=PROMPT, max_tokens=4)
    (said,) = trainer.sidecar.answer(engine.engine.epoch, [question])
    knows = probe(PROMPT, list(said.token_ids), name="knows", role=pb.PROBE_ROLE_KEEP)
    never = probe([1, 2], [3, 4, 5, 6, 7], name="never", role=pb.PROBE_ROLE_KEEP)
    spec: dict[str, Any] = {"epochs": 40, "optimizer": FAST}
    kept = all_events(trainer.submit(probes=[never], accept_if=pb.AcceptIf(), **spec))
    assert kept[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    undo(trainer, 40)
    lost = all_events(trainer.submit(probes=[knows], accept_if=pb.AcceptIf(), **spec))
    assert lost[-1].finished.failure.reason == "PROBES_LOST"
    forgiven = all_events(trainer.submit(probes=[knows], accept_if=pb.AcceptIf(max_lost=1), **spec))
    assert forgiven[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_anchors_that_moved_too_far_reject(attached: Any, all_events: Events) -> None:
    engine, trainer = attached
    before = engine.model.values()
    anchor = pb.Sample(tokens=pb.TokenSample(context_ids=[60, 61], continuation_ids=[9, 10]))
    spec: dict[str, Any] = {"epochs": 20, "optimizer": FAST}
    events = all_events(
        trainer.submit(
            anchors=pb.Anchors(samples=[anchor], weight=1e-6),
            accept_if=pb.AcceptIf(max_anchor_kl=1e-3),
            **spec,
        )
    )
    assert events[-1].finished.failure.reason == "ANCHORS_MOVED"
    (moved,) = next(e.evaluated for e in reversed(events) if e.HasField("evaluated")).anchor_losses
    assert moved > 1e-3
    assert same(engine.model.values(), before)


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_a_run_that_does_not_reach_its_end_is_taken_back_too(
    attached: Any, all_events: Events, end: str
) -> None:
    engine, trainer = attached
    before = live(engine, trainer)
    guard = pb.Guard(min_loss=0, max_loss=1e-3 if end == "failed" else 1e9)
    log = trainer.submit(
        epochs=100_000, optimizer=FAST, guard=guard, probes=[LEARNED], accept_if=pb.AcceptIf()
    )
    if end == "cancelled":
        wait_until(lambda: trainer.status.optimizer_step > 2, "steps")
        trainer.queue.cancel(log.run_id)
    finished = all_events(log)[-1].finished
    states = {"cancelled": pb.RUN_STATE_CANCELLED, "failed": pb.RUN_STATE_FAILED}
    assert (finished.state, finished.steps_done) == (states[end], 0)
    assert same(live(engine, trainer), before)


def test_probes_that_cannot_be_asked_afterwards_reject_and_without_accept_if_warn(
    attached: Any, all_events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trainer = attached
    before, answer, asked = engine.model.values(), trainer.sidecar.answer, list[int]()

    def once(*arguments: Any) -> Any:
        asked.append(1)
        if len(asked) % 2:
            return answer(*arguments)
        raise Unavailable("vLLM is paused by somebody.", reason="PAUSED_BY_OTHERS")

    monkeypatch.setattr(trainer.sidecar, "answer", once)
    events = all_events(trainer.submit(probes=[LEARNED], accept_if=pb.AcceptIf()))
    assert events[-1].finished.failure.reason == "PROBES_NOT_ASKED"
    assert same(engine.model.values(), before)
    events = all_events(trainer.submit(probes=[LEARNED]))
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert [e.warning.reason for e in events if e.HasField("warning")] == ["PROBES_NOT_ASKED"]


def test_a_dry_run_asks_before_and_writes_nothing(attached: Any, all_events: Events) -> None:
    engine, trainer = attached
    before = live(engine, trainer)
    events = all_events(trainer.submit(dry_run=True, probes=[IMPOSSIBLE], accept_if=pb.AcceptIf()))
    assert len(probed(events)) == 1
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert same(live(engine, trainer), before)
