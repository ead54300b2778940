"""Bad input is refused with the path of the field, and costs nothing of what was learned."""

from __future__ import annotations

import math

import pytest

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

pytestmark = pytest.mark.vllm
GOOD = {"context_ids": [70, 71, 72], "continuation_ids": [80, 81]}
VOCABULARY = 259
MAX_TOKENS = 256

CASES = {
    "no samples": ([], {}, "spec.samples"),
    "empty continuation": (
        [GOOD, {"context_ids": [70], "continuation_ids": []}],
        {},
        "spec.samples[1].tokens.continuation_ids",
    ),
    "empty text continuation": (
        [{"context": "a", "continuation": ""}],
        {},
        "spec.samples[0].text.continuation",
    ),
    "no context": (
        [{"context_ids": [], "continuation_ids": [80]}],
        {},
        "spec.samples[0].tokens.context_ids",
    ),
    "token outside the vocabulary": (
        [{"context_ids": [70], "continuation_ids": [VOCABULARY]}],
        {},
        "spec.samples[0].tokens.continuation_ids[0]",
    ),
    "negative token": (
        [{"context_ids": [-1], "continuation_ids": [80]}],
        {},
        "spec.samples[0].tokens.context_ids[0]",
    ),
    "longer than the model takes": (
        [{"context_ids": [70] * MAX_TOKENS, "continuation_ids": [80]}],
        {},
        "spec.samples[0].tokens",
    ),
    "chat without an answer": (
        [{"messages": [{"role": "user", "content": "hello"}]}],
        {},
        "spec.samples[0].chat.messages",
    ),
    "learning rate NaN": ([GOOD], {"lr": math.nan}, "spec.optimizer.lr"),
    "learning rate below zero": ([GOOD], {"lr": -1.0}, "spec.optimizer.lr"),
    "rank 0": ([GOOD], {"rank": 0}, "spec.optimizer.rank"),
    "epochs below zero": ([GOOD], {"epochs": -1}, "spec.epochs"),
}


def scores(stack) -> list[float]:
    return stack.engine_logprobs(list(range(60, 100))).tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_wrong_field_is_named(qwen3, case):
    samples, options, field = CASES[case]
    with pytest.raises(InvalidArgument) as refused:
        list(qwen3.client.train(samples, **options))
    assert [violation.field for violation in refused.value.violations] == [field]
    assert refused.value.message.startswith(field)


def test_every_wrong_field_is_told_at_once(qwen3):
    wrong = {"context_ids": [70], "continuation_ids": [VOCABULARY]}
    with pytest.raises(InvalidArgument) as refused:
        list(qwen3.client.train([wrong, GOOD, wrong]))
    paths = [violation.field for violation in refused.value.violations]
    assert paths == [f"spec.samples[{i}].tokens.continuation_ids[0]" for i in (0, 2)]


def test_a_guard_and_a_coherence_that_are_none_are_refused_not_ignored(qwen3):
    with pytest.raises(InvalidArgument) as refused:
        list(qwen3.client.train([GOOD], max_grad_norm=-1.0))
    assert refused.value.violations[0].field == "spec.guard.max_grad_norm"
    spec = pb.RunSpec(samples=[pb.Sample(text=pb.TextSample(context="a", continuation="b"))])
    spec.coherence.MergeFromString(b"\x08\x63")
    with pytest.raises(InvalidArgument) as refused:
        list(qwen3.client.train_spec(spec))
    assert refused.value.violations[0].field == "spec.coherence.mode"


def test_another_rank_than_the_live_one_is_refused_until_a_reset_is_asked_for(qwen3):
    list(qwen3.client.train([GOOD], lr=1e-5))
    with pytest.raises(FailedPrecondition) as refused:
        list(qwen3.client.train([GOOD], rank=8))
    assert refused.value.reason == "OPTIMIZER_MISMATCH"
    assert "rank 64" in refused.value.message
    for rank in (8, 64):
        *_, last = qwen3.client.train([GOOD], rank=rank, reset_optimizer=True)
        assert last.finished.state == pb.RUN_STATE_SUCCEEDED
    assert qwen3.client.status().optimizer_step == 1


def test_refusals_change_no_weight_and_no_state(qwen3):
    before, status = scores(qwen3), qwen3.client.status()
    for samples, options, _ in CASES.values():
        with pytest.raises(InvalidArgument):
            list(qwen3.client.train(samples, **options))
    after = qwen3.client.status()
    assert scores(qwen3) == before
    assert (after.optimizer_step, after.weight_version, after.active_run_id) == (
        status.optimizer_step,
        status.weight_version,
        "",
    )


def test_text_and_chat_are_learned_as_well(qwen3):
    text = {"context": "The door is", "continuation": " green."}
    chat = {
        "messages": [
            {"role": "user", "content": "Colour?"},
            {"role": "assistant", "content": "Green."},
        ]
    }
    events = list(qwen3.client.train([text, chat], epochs=8, samples_per_step=2, lr=3e-3))
    steps = [event.step for event in events if event.HasField("step")]
    # " green." has 7 bytes; "Green." has 6 and the template's closing token.
    assert {step.tokens for step in steps} == {14}
    assert steps[-1].loss < steps[0].loss
