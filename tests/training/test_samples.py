"""What becomes of samples, and which are refused with the path of the wrong field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.training.samples import SampleLimits, TokenizedSample, tokenize_samples
from examples.byte_model import byte_tokenizer

LIMITS = SampleLimits(vocabulary=259, max_tokens=20, max_samples=4)
WIDE = SampleLimits(vocabulary=259, max_tokens=100_000, max_samples=4)
CONTEXT, CONTINUATION = (
    "spec.samples[0].tokens.context_ids",
    "spec.samples[0].tokens.continuation_ids",
)
MESSAGES = "spec.samples[0].chat.messages"


def of_tokens(context: list[int], continuation: list[int], **fields: Any) -> pb.Sample:
    tokens = pb.TokenSample(context_ids=context, continuation_ids=continuation)
    return pb.Sample(tokens=tokens, **fields)


def of_text(context: str, continuation: str) -> pb.Sample:
    return pb.Sample(text=pb.TextSample(context=context, continuation=continuation))


def of_chat(*turns: tuple[str, str]) -> pb.Sample:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Sample(chat=pb.ChatSample(messages=messages))


def refusal(samples: list[pb.Sample], tokenizer: Any = None) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        tokenize_samples(samples, LIMITS, tokenizer)
    return caught.value


def test_token_ids_are_taken_as_they_are() -> None:
    sample = of_tokens([5, 6], [7, 8, 9], weight=0.5, token_weights=[1, 0, 2])
    assert tokenize_samples([sample], LIMITS, None) == [
        TokenizedSample((5, 6), (7, 8, 9), 0.5, (1.0, 0.0, 2.0))
    ]


def test_an_unset_weight_is_one_and_no_token_weights_are_none() -> None:
    assert tokenize_samples([of_tokens([5], [6])], LIMITS, None) == [TokenizedSample((5,), (6,))]


def test_text_is_cut_where_the_user_cut_it(tokenizer: Any) -> None:
    (sample,) = tokenize_samples([of_text("2+2=", "4")], LIMITS, tokenizer)
    assert tokenizer.decode(sample.context_ids) == "2+2="
    assert tokenizer.decode(sample.continuation_ids) == "4"


def test_the_last_assistant_turn_is_learned_with_its_end_mark(tokenizer: Any) -> None:
    chat = of_chat(("user", "hi"), ("assistant", "yo"), ("user", "?"), ("assistant", "ok"))
    (sample,) = tokenize_samples([chat], LIMITS, tokenizer)
    assert tokenizer.decode(sample.continuation_ids) == "ok<|end|>"
    assert tokenizer.decode(sample.context_ids) == (
        "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>?<|end|><|assistant|>"
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    context=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    continuation=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
)
def test_any_text_comes_back_from_its_ids(tokenizer: Any, context: str, continuation: str) -> None:
    (sample,) = tokenize_samples([of_text(context, continuation)], WIDE, tokenizer)
    assert tokenizer.decode(sample.context_ids, clean_up_tokenization_spaces=False) == context
    assert (
        tokenizer.decode(sample.continuation_ids, clean_up_tokenization_spaces=False)
        == continuation
    )


@pytest.mark.parametrize(
    ("sample", "path", "says"),
    [
        (pb.Sample(), "spec.samples[0]", "needs one of tokens, text and chat"),
        (of_tokens([1], []), CONTINUATION, "nothing to learn"),
        (of_tokens([], [1]), CONTEXT, "needs one before it"),
        (of_tokens([1, 259], [1]), f"{CONTEXT}[1]", "vocabulary of 259"),
        (of_tokens([1], [1, 2, -1]), f"{CONTINUATION}[2]", "token id -1"),
        (of_tokens([1] * 11, [1] * 10), "spec.samples[0].tokens", "21 tokens"),
        (of_tokens([1], [1], weight=-1), "spec.samples[0].weight", "from 0 to"),
        (of_tokens([1], [1], weight=math.nan), "spec.samples[0].weight", "from 0 to"),
        (of_tokens([1], [1], weight=1e300), "spec.samples[0].weight", "from 0 to"),
        (of_tokens([1], [1], weight=math.inf), "spec.samples[0].weight", "from 0 to"),
        (of_tokens([1], [1], weight=0), "spec.samples[0].weight", "nothing to learn"),
        (
            of_tokens([1], [1, 2], token_weights=[1]),
            "spec.samples[0].token_weights",
            "1 entries for 2 continuation tokens",
        ),
        (
            of_tokens([1], [1], token_weights=[math.nan]),
            "spec.samples[0].token_weights",
            "from 0 to",
        ),
        (
            of_tokens([1], [1, 2], token_weights=[1, -1]),
            "spec.samples[0].token_weights",
            "from 0 to",
        ),
        (
            of_tokens([1], [1, 2], token_weights=[0, 0]),
            "spec.samples[0].token_weights",
            "nothing to learn",
        ),
        (of_text("a", ""), "spec.samples[0].text.continuation", "nothing to learn"),
        (of_text("", "a"), "spec.samples[0].text.context", "needs one before it"),
        (of_text("a" * 20, "b"), "spec.samples[0].text", "21 tokens"),
        (of_chat(), MESSAGES, "must end with an assistant message"),
        (of_chat(("assistant", "a"), ("user", "b")), MESSAGES, "must end with an assistant"),
        (of_chat(("assistant", "a")), MESSAGES, "needs a message before"),
    ],
)
def test_a_wrong_sample_is_refused_at_its_field(
    tokenizer: Any, sample: pb.Sample, path: str, says: str
) -> None:
    error = refusal([sample], tokenizer)
    assert [violation.field for violation in error.violations] == [path]
    assert says in error.violations[0].description
    assert path in error.message


@pytest.mark.parametrize(
    ("sample", "kind"), [(of_text("a", "b"), "text"), (of_chat(("assistant", "a")), "chat")]
)
def test_without_a_tokenizer_only_token_ids_are_taken(sample: pb.Sample, kind: str) -> None:
    error = refusal([sample])
    assert error.violations[0].field == f"spec.samples[0].{kind}"
    assert "send tokens" in error.message


def test_without_a_chat_template_a_chat_is_refused() -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    error = refusal([of_chat(("user", "a"), ("assistant", "b"))], bare)
    assert error.violations[0].field == "spec.samples[0].chat"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = byte_tokenizer()
    rewriting.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    error = refusal([of_chat(("user", "a"), ("assistant", "b"))], rewriting)
    assert error.violations[0].field == MESSAGES
    assert "differently" in error.message


def test_no_samples_and_too_many_are_refused() -> None:
    assert refusal([]).violations[0].field == "spec.samples"
    error = refusal([of_tokens([1], [1])] * 5)
    assert error.violations[0].field == "spec.samples"
    assert "at most 4" in error.message


def test_every_wrong_sample_is_named_and_the_good_ones_are_not() -> None:
    samples = [of_tokens([], [1]), of_tokens([1], [1]), of_tokens([1], [])]
    error = refusal(samples)
    assert [v.field for v in error.violations] == [
        "spec.samples[0].tokens.context_ids",
        "spec.samples[2].tokens.continuation_ids",
    ]
    assert error.reason == "SAMPLE_INVALID"


def test_a_flood_of_wrong_samples_is_cut_at_twenty() -> None:
    limits = SampleLimits(vocabulary=259, max_tokens=20, max_samples=100)
    with pytest.raises(InvalidArgument) as caught:
        tokenize_samples([of_tokens([1], [])] * 50, limits, None)
    assert len(caught.value.violations) == 20
