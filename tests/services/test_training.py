"""TrainingService over a real channel: runs, refusals, callers that leave."""

from __future__ import annotations

from typing import Any

from apollo_grpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from apollo_grpc.v1 import training_pb2 as pb


def test_a_run_streams_its_events_from_the_first_to_finished(caller: Any) -> None:
    events = caller.train(epochs=5, optimizer=pb.OptimizerConfig(lr=1e-2))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert len({event.run_id for event in events}) == 1
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["queued", "started", *["step"] * 5, "state_saved", "finished"]
    assert events[6].step.loss < events[2].step.loss
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_text_and_chat_are_tokenized_by_the_served_model(caller: Any) -> None:
    messages = [
        pb.ChatMessage(role="user", content="a"),
        pb.ChatMessage(role="assistant", content="b"),
    ]
    samples = [
        pb.Sample(text=pb.TextSample(context="2+2=", continuation="four")),
        pb.Sample(chat=pb.ChatSample(messages=messages)),
    ]
    steps = [e.step.tokens for e in caller.train(samples=samples) if e.HasField("step")]
    assert steps == [4, 2]


def test_bad_input_names_every_wrong_field(caller: Any, error_of: Any) -> None:
    samples = [
        pb.Sample(tokens=pb.TokenSample(context_ids=[1], continuation_ids=[999])),
        pb.Sample(),
    ]
    error = error_of(caller.start(samples=samples))
    assert isinstance(error, InvalidArgument)
    assert [v.field for v in error.violations] == [
        "spec.samples[0].tokens.continuation_ids[0]",
        "spec.samples[1]",
    ]
    options = error_of(caller.start(optimizer=pb.OptimizerConfig(lr=-1, eps=0)))
    assert [v.field for v in options.violations] == ["spec.optimizer.lr", "spec.optimizer.eps"]
    missing = error_of(caller.training.Train(pb.TrainRequest()))
    assert [v.field for v in missing.violations] == ["spec"]


def test_a_sample_longer_than_the_engine_takes_is_refused(caller: Any, error_of: Any) -> None:
    long = pb.Sample(tokens=pb.TokenSample(context_ids=[1] * 40, continuation_ids=[1] * 9))
    assert "at most 48" in error_of(caller.start(samples=[long])).message


def test_another_optimizer_state_is_refused_before_the_run(caller: Any, error_of: Any) -> None:
    error = error_of(caller.start(optimizer=pb.OptimizerConfig(rank=4)))
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "OPTIMIZER_MISMATCH"


def test_without_an_engine_the_answer_says_what_to_start(start_server: Any, error_of: Any) -> None:
    error = error_of(start_server().start())
    assert isinstance(error, Unavailable)
    assert "start vLLM with VLLM_PLUGINS=apollo" in error.message


def test_a_guard_that_is_none_is_refused_at_its_field(caller: Any, error_of: Any) -> None:
    error = error_of(caller.start(guard=pb.Guard(max_grad_norm=-1.0)))
    assert [v.field for v in error.violations] == ["spec.guard.max_grad_norm"]


def test_a_dry_run_tells_its_steps_and_trains_nothing(caller: Any) -> None:
    steps = [e.step for e in caller.train(dry_run=True, epochs=2) if e.HasField("step")]
    assert len(steps) == 2
    assert all(step.dry_run and step.update_norm > 0 for step in steps)
    assert caller.status().optimizer_step == caller.status().weight_version == 0


def test_a_caller_that_goes_away_does_not_stop_its_run(caller: Any, wait: Any) -> None:
    stream = caller.start(epochs=40)
    for answer in stream:
        if answer.event.HasField("step"):
            break
    stream.cancel()
    wait(lambda: not caller.status().active_run_id, "the end of the run")
    assert caller.status().optimizer_step == 40
    assert caller.status().weight_version == 40
