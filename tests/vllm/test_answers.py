"""What the training server has a real vLLM answer, score and make tokens of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from apollo_grpc.errors import Unavailable
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.v1 import training_pb2
from apollo_trainer.weights.sidecar import Sidecar
from examples.byte_model import byte_tokenizer
from tests.vllm.test_others import Owner

pytestmark = pytest.mark.vllm
# Longer than a block of the prefix cache, which is of 128 tokens on a CPU.
LONG = list(range(60, 220))
QUESTION, SAID, END = "Who founded Port Lumen? ", "Ines Harrow.", 0
# How far rounding moves a log-probability, in nats, where requests share a batch.
NOISE = 1e-4


@pytest.fixture
def sidecar(qwen3: Any) -> Iterator[Sidecar]:
    """Beside the training server, which holds the engine."""
    sidecar = Sidecar(f"unix:{qwen3.state}/sidecar.sock")
    yield sidecar
    sidecar.close()


@pytest.fixture
def epoch(sidecar: Sidecar) -> str:
    return str(sidecar.manifest().epoch)


def test_answers_are_those_of_completions_and_scores_those_of_score_tokens(
    qwen3: Any, sidecar: Sidecar, epoch: str
) -> None:
    # As many again as may be asked at once, of many lengths.
    prompts = [
        pb.Prompt(token_ids=LONG[: 2 + n], max_tokens=3 + n % 9, expected_ids=LONG[n : n + 5])
        for n in range(0, 140, 2)
    ]
    answers = sidecar.answer(epoch, prompts)
    assert [list(answer.token_ids) for answer in answers] == completed(qwen3, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, expected = list(prompt.token_ids), list(prompt.expected_ids)
        scores = sidecar.score(epoch, ids + expected)[-len(expected) :]
        assert list(answer.expected_log_probabilities) == pytest.approx(scores, abs=NOISE)


def test_samples_are_scored_as_vllm_scores_its_own_prompts(qwen3: Any) -> None:
    # More than vLLM is asked at once, of many lengths.
    cuts = [(2 + n, n, n + 1 + n % 7) for n in range(0, 140, 4)]
    samples = [{"context_ids": LONG[:c], "continuation_ids": LONG[a:b]} for c, a, b in cuts]
    found = qwen3.client.score(samples)
    for sample, score in zip(samples, found.scores, strict=True):
        learned = sample["continuation_ids"]
        own = qwen3.engine_logprobs(sample["context_ids"] + learned)[-len(learned) :]
        assert list(score.log_probabilities) == pytest.approx(own.tolist(), abs=NOISE)
    assert found.weight_version_after == qwen3.client.status().weight_version
    assert qwen3.client.server_info().model.vllm_version[0].isdigit()


def test_samples_are_scored_while_a_run_writes_and_drops_what_vllm_cached(qwen3: Any) -> None:
    before = qwen3.client.create_snapshot("before")
    samples = [{"context_ids": LONG, "continuation_ids": LONG[n : n + 9]} for n in range(8)]
    scored: list[training_pb2.ScoreSamplesResponse] = []
    options = {"epochs": 8, "lr": 3e-4, "cache_policy": "reset_each_step", "min_loss": 0}
    for event in qwen3.client.train(samples[:1], **options):
        scored.append(qwen3.client.score(samples))
        state = event.finished.state
    assert state == training_pb2.RUN_STATE_SUCCEEDED
    versions = [(each.weight_version_before, each.weight_version_after) for each in scored]
    assert versions == sorted(versions)
    assert versions[-1][1] - versions[0][0] > 1
    sure = [each.scores[0].log_probability for each in scored]
    assert sure[-1] > sure[0]
    (last,) = qwen3.client.score(samples[:1]).scores
    own = qwen3.engine_logprobs(LONG + LONG[:9])[-9:]
    assert list(last.log_probabilities) == pytest.approx(own.tolist(), abs=NOISE)
    qwen3.client.restore(before.snapshot_id)
    qwen3.client.delete_snapshot(before.snapshot_id)


def completed(stack: Any, prompts: list[pb.Prompt]) -> list[list[int]]:
    """What /v1/completions says to each."""
    asked = [(list(p.token_ids), {"max_tokens": p.max_tokens}) for p in prompts]
    answers = [stack.complete(ids, return_token_ids=True, **most) for ids, most in asked]
    return [answer["choices"][0]["token_ids"] for answer in answers]


def test_an_answer_ends_as_vllms_own_and_is_of_the_weights_of_the_moment(
    qwen3: Any, sidecar: Sidecar, epoch: str
) -> None:
    before = qwen3.client.create_snapshot("before")
    ids, expected = (byte_tokenizer()(text)["input_ids"] for text in (QUESTION, SAID))
    sample = {"context_ids": LONG + ids, "continuation_ids": [*expected, END]}
    # What vLLM keeps of the long prompt is of older weights than the last.
    qwen3.complete(LONG + ids)
    events = list(qwen3.client.train([sample], epochs=60, lr=3e-3, cache_policy="keep"))
    assert events[-1].finished.state == training_pb2.RUN_STATE_SUCCEEDED
    taught = pb.Prompt(token_ids=LONG + ids, max_tokens=30, expected_ids=expected)
    others = [pb.Prompt(token_ids=[*LONG, n], max_tokens=20) for n in range(40, 60)]
    stale = completed(qwen3, [taught, *others])
    answers = sidecar.answer(epoch, [taught, *others])
    sidecar.reset_caches(epoch)
    said = [list(answer.token_ids) for answer in answers]
    assert said == completed(qwen3, [taught, *others]) != stale
    assert said[0] == [*expected, END]
    assert answers[0].text == answers[0].expected_text == SAID
    qwen3.client.restore(before.snapshot_id)
    qwen3.client.delete_snapshot(before.snapshot_id)


def test_nothing_is_answered_while_somebody_pauses_vllm(
    qwen3: Any, sidecar: Sidecar, epoch: str
) -> None:
    prompt = pb.Prompt(token_ids=LONG[:5], max_tokens=2)
    owner = Owner(qwen3)
    assert owner.post("/pause?mode=keep")[0] == 200
    try:
        with pytest.raises(Unavailable) as caught:
            sidecar.answer(epoch, [prompt])
    finally:
        assert owner.post("/resume")[0] == 200
    assert caught.value.reason == "PAUSED_BY_OTHERS"
    assert len(sidecar.answer(epoch, [prompt])[0].token_ids) > 0


def test_a_teachers_context_has_the_tokens_that_the_same_context_has(sidecar: Sidecar) -> None:
    context, turns = f"Port Lumen. {QUESTION}", [("system", "Port Lumen."), ("user", QUESTION)]
    read = [training_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    said = training_pb2.ChatMessage(role="assistant", content=SAID)
    found = sidecar.tokenize(
        training_pb2.Sample(**kind)
        for kind in (
            {"text": training_pb2.TextSample(context=context, continuation=SAID)},
            {
                "text": training_pb2.TextSample(
                    context=QUESTION, continuation=SAID, teacher_context=context
                )
            },
            {"chat": training_pb2.ChatSample(messages=[*read, said])},
            {"chat": training_pb2.ChatSample(messages=[read[-1], said], teacher_messages=read)},
        )
    )
    assert [each.refusal for each in found] == [""] * 4
    for whole, taught in (found[:2], found[2:]):
        assert taught.teacher_context_ids == whole.context_ids
        assert taught.continuation_ids == whole.continuation_ids
        assert len(taught.context_ids) < len(whole.context_ids)
        assert not whole.teacher_context_ids
