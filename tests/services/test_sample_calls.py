"""What is asked about samples beside the runs: what they come to, and how likely they are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from apollo_grpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_sidecar.own_batch import SCORE_PREFIX
from apollo_sidecar.own_requests import ANSWER_PREFIX
from apollo_trainer.runs import scoring
from tests.waiting import HANG

SAMPLES = [
    pb.Sample(tokens=pb.TokenSample(context_ids=range(60, 60 + n), continuation_ids=[70, 71, 72]))
    for n in range(1, 8)
]
TEXT = pb.Sample(text=pb.TextSample(context="2+2=", continuation="four"))
WRONG = pb.Sample(tokens=pb.TokenSample(context_ids=[1], continuation_ids=[5, 999]))
# What is of a loss, and of none of these calls.
JUDGED = pb.Sample(
    text=pb.TextSample(context="2+2=", continuation="four", teacher_context="It is four. 2+2="),
    weight=0.5,
    token_weights=[1, 2],
    advantages=[3],
    sampler_log_probabilities=[-1],
)


@pytest.fixture(params=[{}, {"PROMPTS_AT_ONCE": 3}, {"TOKENS_AT_ONCE": 9}])
def batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many of the samples vLLM is asked at once."""
    for name, number in request.param.items():
        monkeypatch.setattr(scoring, name, number)


@pytest.fixture
def served(start_engine: Callable[..., Any], start_server: Callable[..., Any]) -> Any:
    """An engine, and a caller of a server that is attached to it."""
    engine, caller = start_engine(), start_server()
    caller.wait_attached()
    return engine, caller


def score(caller: Any, samples: list[pb.Sample]) -> pb.ScoreSamplesResponse:
    return caller.training.ScoreSamples(pb.ScoreSamplesRequest(samples=samples), timeout=HANG)


def count(caller: Any, samples: list[pb.Sample]) -> list[tuple[int, int]]:
    request = pb.CountTokensRequest(samples=samples)
    counts = caller.training.CountTokens(request, timeout=HANG).counts
    return [(each.context_tokens, each.continuation_tokens) for each in counts]


def validate(caller: Any, **spec: Any) -> pb.ValidateRunResponse:
    request = pb.ValidateRunRequest(spec=pb.RunSpec(**spec))
    return caller.training.ValidateRun(request, timeout=HANG)


@pytest.mark.usefixtures("batches")
def test_scores_are_vllms_own_of_the_live_weights_and_in_order(served: Any) -> None:
    engine, caller = served
    first = score(caller, SAMPLES)
    for sample, found in zip(SAMPLES, first.scores, strict=True):
        ids = [*sample.tokens.context_ids, *sample.tokens.continuation_ids]
        assert list(found.log_probabilities) == engine.model.score(ids)[-3:]
        assert found.log_probability == pytest.approx(sum(found.log_probabilities))
    assert first.weight_version_before == first.weight_version_after == 0
    caller.train(samples=SAMPLES[:1], epochs=2, optimizer=pb.OptimizerConfig(lr=1e-2))
    after = score(caller, SAMPLES)
    assert after.weight_version_before == after.weight_version_after == 2
    assert after.scores[0].log_probability > first.scores[0].log_probability
    assert caller.status().optimizer_step == 2


def test_weights_that_change_meanwhile_are_told(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, caller = served
    monkeypatch.setattr(scoring, "PROMPTS_AT_ONCE", 1)
    ask, versions = engine.engine.requests.score, iter(range(1, 99))

    async def asked(*arguments: Any) -> list[float]:
        engine.engine._version.number = next(versions)
        return await ask(*arguments)

    monkeypatch.setattr(engine.engine.requests, "score", asked)
    found = score(caller, SAMPLES[:3])
    assert (found.weight_version_before, found.weight_version_after) == (0, 3)


def test_a_pause_is_waited_for_and_nobody_else_waits_meanwhile(served: Any) -> None:
    engine, caller = served
    paused, resumed = threading.Event(), threading.Event()
    engine.client.before["reset_prefix_cache"] = lambda: paused.set() or resumed.wait(HANG)
    stream = caller.start(coherence=pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_RUN))
    assert paused.wait(HANG)
    request = pb.ScoreSamplesRequest(samples=SAMPLES)
    waiting = [caller.training.ScoreSamples.future(request, timeout=HANG) for _ in range(5)]
    assert count(caller, SAMPLES[:1]) == [(1, 3)]
    assert validate(caller, samples=SAMPLES).steps_total == 7
    assert caller.run(next(stream).event.run_id).state == pb.RUN_STATE_RUNNING
    assert not any(call.done() for call in waiting)
    resumed.set()
    assert [call.result().weight_version_before for call in waiting] == [1] * 5


def test_scores_that_wait_for_vllm_hold_up_no_run_and_no_run_holds_them_up(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, caller = served
    stream = caller.start(epochs=100_000, dry_run=True)
    at_work = next(stream).event.run_id
    assert len(score(caller, SAMPLES).scores) == 7
    assert caller.run(at_work).state == pb.RUN_STATE_RUNNING
    caller.cancel(at_work)
    asked, go_on, scored = threading.Event(), asyncio.Event(), engine.engine.requests.score

    async def held(ids: list[int], prefix: str = SCORE_PREFIX) -> list[float]:
        # Not those of the run's own.
        if prefix == ANSWER_PREFIX:
            asked.set()
            await go_on.wait()
        return await scored(ids, prefix)

    monkeypatch.setattr(engine.engine.requests, "score", held)
    request = pb.ScoreSamplesRequest(samples=SAMPLES)
    waiting = [caller.training.ScoreSamples.future(request, timeout=HANG) for _ in range(5)]
    assert asked.wait(HANG)
    # Its tokens are vLLM's to make, by the threads that runs have.
    assert caller.train(samples=[TEXT])[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert not any(call.done() for call in waiting)
    engine._loop.call_soon_threadsafe(go_on.set)
    assert [len(call.result().scores) for call in waiting] == [7] * 5


def test_whoever_leaves_while_vllm_is_paused_makes_room(served: Any, error_of: Any) -> None:
    engine, caller = served
    engine.engine.leases.acquire("mine", 60.0, "keep")
    request = pb.ScoreSamplesRequest(samples=SAMPLES)
    for call in [caller.training.ScoreSamples.future(request, timeout=HANG) for _ in range(4)]:
        call.cancel()
    # Read in its turn, and refused before vLLM is asked.
    assert error_of(lambda: score(caller, [WRONG])).reason == "SAMPLE_INVALID"
    assert engine.engine.paused
    engine.engine.leases.release("mine", 0, False)
    assert len(score(caller, SAMPLES).scores) == 7


def test_a_wrong_sample_is_named_by_its_path(caller: Any, error_of: Any) -> None:
    for call in (lambda: score(caller, [TEXT, WRONG]), lambda: count(caller, [TEXT, WRONG])):
        error = error_of(call)
        assert isinstance(error, InvalidArgument)
        assert [v.field for v in error.violations] == ["samples[1].tokens.continuation_ids[1]"]
    # vLLM scores only where it could go on.
    whole = pb.Sample(tokens=pb.TokenSample(context_ids=[1] * 40, continuation_ids=[1] * 8))
    assert count(caller, [whole]) == [(40, 8)]
    error = error_of(lambda: score(caller, [whole]))
    assert [v.field for v in error.violations] == ["samples[0].tokens"]


def test_more_than_a_call_takes_is_refused(
    caller: Any, error_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of(lambda: score(caller, [pb.Sample()] * 1025))
    assert [v.description for v in error.violations] == [
        "has 1025 samples; a call takes at most 1024"
    ]
    monkeypatch.setattr(scoring, "MAX_TOKENS", 5)
    error = error_of(lambda: score(caller, SAMPLES[:2]))
    assert [v.description for v in error.violations] == [
        "has 6 continuation tokens; a call takes at most 5"
    ]


def test_tokens_are_those_that_are_trained_whatever_the_loss(caller: Any) -> None:
    events = caller.train(samples=[TEXT], dry_run=True)
    (step,) = [event.step for event in events if event.HasField("step")]
    assert count(caller, [TEXT, JUDGED, *SAMPLES[:2]]) == [(4, step.tokens)] * 2 + [(1, 3), (2, 3)]
    plain, judged = score(caller, [TEXT, JUDGED]).scores
    assert plain == judged


def test_nothing_is_asked_about_no_samples(caller: Any) -> None:
    caller.train()
    assert count(caller, []) == []
    found = score(caller, [])
    assert (len(found.scores), found.weight_version_before, found.weight_version_after) == (0, 1, 1)


def test_a_valid_run_is_told_and_not_begun(caller: Any) -> None:
    found = validate(caller, samples=[*SAMPLES, TEXT], epochs=3, samples_per_step=3)
    assert found.steps_total == 9
    assert found.context_tokens == sum(range(1, 8)) + 4
    assert found.continuation_tokens == 7 * 3 + 4
    assert found.longest_sample_tokens == 10
    assert not caller.list().runs
    assert caller.status().optimizer_step == 0


def test_what_train_refuses_is_refused_with_the_same_words(caller: Any, error_of: Any) -> None:
    for spec in (
        {"samples": [TEXT, WRONG, JUDGED]},
        {"samples": []},
        {"samples": SAMPLES, "optimizer": pb.OptimizerConfig(lr=-1)},
        {"samples": SAMPLES, "optimizer": pb.OptimizerConfig(rank=4)},
    ):
        asked = error_of(lambda spec=spec: validate(caller, **spec))
        trained = error_of(caller.start(**spec))
        assert type(asked) is type(trained) in (InvalidArgument, FailedPrecondition)
        assert (asked.message, asked.reason) == (trained.message, trained.reason)
        assert asked.violations == trained.violations
    missing = error_of(lambda: caller.training.ValidateRun(pb.ValidateRunRequest()))
    assert [v.field for v in missing.violations] == ["spec"]


def test_a_full_queue_is_told(
    start_engine: Any, start_server: Any, error_of: Any, wait: Any
) -> None:
    start_engine()
    caller = start_server(max_queued_runs=1)
    caller.wait_attached()
    streams = [caller.start(epochs=100_000, dry_run=True)]
    next(streams[0])
    wait(lambda: not caller.status().queue_length, "the run's turn")
    streams.append(caller.start(dry_run=True))
    next(streams[1])
    error = error_of(lambda: validate(caller, samples=SAMPLES))
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "QUEUE_FULL"
    for run in caller.list().runs:
        caller.cancel(run.run_id)


def test_without_an_engine_nothing_is_known(start_server: Any, error_of: Any) -> None:
    caller = start_server()
    for call in (score, count):
        assert isinstance(error_of(lambda call=call: call(caller, SAMPLES)), Unavailable)
    assert isinstance(error_of(lambda: validate(caller, samples=SAMPLES)), Unavailable)


def test_an_engine_that_goes_while_it_is_asked_is_told_as_lost(served: Any, error_of: Any) -> None:
    engine, caller = served
    engine.engine.leases.acquire("mine", 60.0, "keep")
    request = pb.ScoreSamplesRequest(samples=SAMPLES)
    call = caller.training.ScoreSamples.future(request, timeout=HANG)
    engine.stop()
    error = error_of(call.result)
    assert isinstance(error, Unavailable)
    assert error.reason in ("ENGINE_LOST", "ENGINE_NOT_ATTACHED")
