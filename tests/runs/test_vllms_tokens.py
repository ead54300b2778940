"""Texts and chats become tokens in vLLM: what becomes of runs while it is away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from apollo_grpc.errors import Unavailable
from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.runs import queue
from apollo_trainer.weights.sidecar import Sidecar
from tests.waiting import wait_until

ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
TEXT = pb.Sample(text=pb.TextSample(context="2+2=", continuation="4"))


def tokens_of(events: list[pb.RunEvent]) -> list[int]:
    return [event.step.tokens for event in events if event.HasField("step")]


class Away:
    """`Sidecar.tokenize` of a vLLM that is not there, until `back`."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.calls, self.is_back, tokenize = 0, False, Sidecar.tokenize

        def asked(sidecar: Sidecar, samples: Sequence[Any]) -> Sequence[export_pb.TokenizedSample]:
            self.calls += 1
            if not self.is_back:
                raise Unavailable("vLLM is away.", reason="ENGINE_LOST")
            return tokenize(sidecar, samples)

        patch.setattr(Sidecar, "tokenize", asked)

    def back(self) -> None:
        self.is_back = True


@pytest.fixture
def waiting(start_engine: Any, start_trainer: Any) -> Any:
    """An engine, and the id of a run of text that waited when its server ended."""
    engine, first = start_engine(), start_trainer()
    first.wait_for(ATTACHED)
    first.submit(epochs=100_000, dry_run=True)
    log = first.submit("mine", samples=[TEXT])
    first.stop()
    return engine, log.run_id


def test_a_run_is_not_taken_and_not_lost_while_nobody_answers(attached: Any) -> None:
    engine, trainer = attached
    engine.stop()
    with pytest.raises(Unavailable) as caught:
        trainer.sidecar.tokenize([TEXT])
    assert caught.value.reason == "ENGINE_LOST"
    assert "Nothing was done" in caught.value.message


def test_a_run_that_was_brought_back_waits_until_vllm_answers(
    waiting: Any, start_trainer: Any, all_events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run_id = waiting
    away = Away(monkeypatch)
    monkeypatch.setattr(queue, "TURN_AGAIN_SECONDS", 0.01)
    trainer = start_trainer()
    trainer.wait_for(ATTACHED)
    wait_until(lambda: away.calls > 3, "another try")
    log = trainer.queue.log_of(run_id)
    assert log.sequence == 1
    away.back()
    events = all_events(log)
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert tokens_of(events) == [1]


def test_runs_behind_one_that_was_brought_back_have_their_turns_with_the_next_engine(
    waiting: Any,
    start_engine: Any,
    start_trainer: Any,
    all_events: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, run_id = waiting
    away = Away(monkeypatch)
    trainer = start_trainer()
    trainer.wait_for(ATTACHED)
    wait_until(lambda: away.calls > 1, "the first try")
    behind = trainer.submit(optimizer=pb.OptimizerConfig(accept_other_weights=True))
    engine.stop()
    trainer.wait_for(status_pb2.ATTACHMENT_STATE_DETACHED)
    away.back()
    start_engine()
    for log in (trainer.queue.log_of(run_id), behind):
        events = all_events(log)
        assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_a_paused_engine_makes_tokens(attached: Any) -> None:
    engine, trainer = attached
    epoch = trainer.owner.session().attachment.epoch
    trainer.sidecar.pause(epoch, "mine", 10.0)
    (found,) = trainer.sidecar.tokenize([TEXT])
    trainer.sidecar.resume(epoch, "mine", weights_changed=False)
    assert len(found.continuation_ids) == 1
    assert engine.calls == ["pause keep", "resume"]


def test_the_status_says_which_samples_are_refused(
    model_folder: Any, start_engine: Any, start_trainer: Any
) -> None:
    (model_folder / "chat_template.jinja").unlink()
    start_engine()
    detail = start_trainer().wait_for(ATTACHED).attachment_detail
    assert "Chats are refused: the served model has no chat template" in detail
    assert "Texts" not in detail
