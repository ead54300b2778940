"""What is wrong with a sample whatever the model is, is found without one, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.samples import JUDGED, SampleLimits, each_tokenized
from apollo_trainer.requests.structure import MAX_VIOLATIONS, require_structure

TOKENS = pb.TokenSample(context_ids=[1, 2], continuation_ids=[3, 4])
TEXT = pb.TextSample(context="a", continuation="b")
LIMITS = SampleLimits(vocabulary=2**31 - 1, max_tokens=100, max_samples=100)
IDS = st.lists(st.sampled_from([-1, 0, 5]), max_size=3)
FIGURES = st.lists(st.sampled_from([0.0, -0.5, 2.0, float("nan"), 1e7]), max_size=3)


def field_of(sample: pb.Sample) -> str | None:
    """The field that is refused; None where none is."""
    try:
        require_structure([sample], "samples[{}]", 7)
    except InvalidArgument as error:
        assert error.reason == "SAMPLE_INVALID"
        return error.violations[0].field.removeprefix("samples[7]").removeprefix(".")
    return None


@pytest.mark.parametrize(
    ("sample", "field"),
    [
        (pb.Sample(), ""),
        (pb.Sample(tokens=pb.TokenSample(context_ids=[1])), "tokens.continuation_ids"),
        (pb.Sample(tokens=pb.TokenSample(continuation_ids=[1])), "tokens.context_ids"),
        (
            pb.Sample(tokens=pb.TokenSample(context_ids=[1], continuation_ids=[1, -1])),
            "tokens.continuation_ids[1]",
        ),
        (
            pb.Sample(
                tokens=pb.TokenSample(
                    context_ids=[1], continuation_ids=[1], teacher_context_ids=[-5]
                )
            ),
            "tokens.teacher_context_ids[0]",
        ),
        (pb.Sample(text=pb.TextSample(context="a")), "text.continuation"),
        (pb.Sample(chat=pb.ChatSample()), "chat.messages"),
        (pb.Sample(text=TEXT, weight=float("nan")), "weight"),
        (pb.Sample(text=TEXT, weight=0), "weight"),
        (pb.Sample(text=TEXT, token_weights=[-1]), "token_weights"),
        (pb.Sample(tokens=TOKENS, token_weights=[1]), "token_weights"),
        (pb.Sample(tokens=TOKENS, token_weights=[0, 0]), "token_weights"),
        (pb.Sample(text=TEXT, advantages=[float("inf")]), "advantages"),
        (pb.Sample(tokens=TOKENS, advantages=[1, 1, 1]), "advantages"),
        (pb.Sample(text=TEXT, sampler_log_probabilities=[0.5]), "sampler_log_probabilities"),
        (
            pb.Sample(tokens=TOKENS, advantages=[1], sampler_log_probabilities=[-1]),
            "sampler_log_probabilities",
        ),
    ],
)
def test_what_no_model_takes_is_refused_by_its_path(sample: pb.Sample, field: str) -> None:
    assert field_of(sample) == field


def test_only_a_model_tells_how_many_tokens_a_text_has() -> None:
    assert field_of(pb.Sample(text=pb.TextSample(continuation="b"))) is None
    assert field_of(pb.Sample(text=TEXT, token_weights=[1, 1, 1])) is None
    assert field_of(pb.Sample(text=TEXT, advantages=[1, 1, 1])) is None


def test_the_first_twenty_are_told() -> None:
    with pytest.raises(InvalidArgument) as refused:
        require_structure([pb.Sample(text=TEXT)] + [pb.Sample()] * 100, "samples[{}]", 30)
    fields = [violation.field for violation in refused.value.violations]
    assert fields == [f"samples[{number}]" for number in range(31, 31 + MAX_VIOLATIONS)]


@given(IDS, IDS, FIGURES, FIGURES, FIGURES)
def test_what_is_refused_here_a_run_refuses_too(
    context: list[int],
    continuation: list[int],
    weights: list[float],
    advantages: list[float],
    log_probs: list[float],
) -> None:
    sample = pb.Sample(
        tokens=pb.TokenSample(context_ids=context, continuation_ids=continuation),
        token_weights=weights,
        advantages=advantages,
        sampler_log_probabilities=log_probs,
    )
    try:
        list(each_tokenized([sample], LIMITS, lambda samples: [], JUDGED))
    except InvalidArgument:
        return
    assert field_of(sample) is None
