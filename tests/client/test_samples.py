"""Samples are read as they were written, or refused with the place of the mistake."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client import run_spec, to_sample, to_samples
from apollo_grpc.errors import ApolloError, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
IDS = st.lists(st.integers(0, 2**31 - 1))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = (
    *("context", "continuation", "context_ids", "continuation_ids", "messages", "weight"),
    *("teacher_context", "teacher_context_ids", "teacher_messages", "token_weights"),
    *("advantages", "sampler_log_probabilities"),
)


@given(TEXT, TEXT)
def test_text_arrives_as_it_was_written(context, continuation):
    sample = to_sample({"context": context, "continuation": continuation})
    assert (sample.text.context, sample.text.continuation) == (context, continuation)
    assert to_sample((context, continuation)) == sample


@given(IDS, IDS, st.lists(st.floats(0, 10)))
def test_token_ids_and_weights_arrive_as_they_were_written(context, continuation, weights):
    sample = to_sample(
        {"context_ids": context, "continuation_ids": continuation, "token_weights": weights}
    )
    assert list(sample.tokens.context_ids) == context
    assert list(sample.tokens.continuation_ids) == continuation
    assert list(sample.token_weights) == weights
    assert not sample.HasField("weight")


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1))
def test_chat_arrives_as_it_was_written(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    sample = to_sample({"messages": messages})
    assert [(m.role, m.content) for m in sample.chat.messages] == turns


def chat(*turns, **extras):
    keys = ("role", "content", "weight")
    return {"messages": [dict(zip(keys, turn, strict=False)) for turn in turns], **extras}


def turns_of(sample):
    return [(message.role, message.content) for message in sample.chat.messages]


def test_in_openai_format_each_answer_with_weight_is_learned_after_what_came_before():
    first, second = to_samples(
        chat(
            ("system", "be kind"), ("user", "a"), ("assistant", "b", 0),
            ("user", "c"), ("assistant", "d", 1), ("user", "e"), ("assistant", "f"),
            weight=0.5,
        )
    )  # fmt: skip
    everything = [("system", "be kind"), *zip(["user", "assistant"] * 3, "abcdef", strict=True)]
    assert turns_of(first) == everything[:5]
    assert turns_of(second) == everything
    assert first.weight == second.weight == 0.5


def test_without_weights_the_last_answer_is_learned():
    value = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert [turns_of(s) for s in to_samples(value)] == [turns_of(to_sample(value))]
    assert len(turns_of(to_sample(value))) == 4


def test_text_in_parts_is_put_together():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns_of(to_sample(chat(("user", parts), ("assistant", "c")))) == [
        ("user", "ab"),
        ("assistant", "c"),
    ]


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (chat(("user", "a", 1), ("assistant", "b")), "messages[0].weight"),
        (chat(("user", "a"), ("assistant", "b", 0.5)), "messages[1].weight"),
        (chat(("user", "a"), ("assistant", "b", True)), "messages[1].weight"),
        (chat(("user", "a"), ("assistant", "b", 0)), "messages"),
        (chat(("user", "a"), ("assistant", None)), "messages[1].content"),
        (chat(("user", "a"), ("assistant", [{"type": "image_url"}])), "messages[1].content"),
        ({"messages": [{"role": "user", "content": "a", "audio": {}}]}, "messages[0].audio"),
        (chat(("user", 3), ("assistant", "b")), "messages[0].content"),
        (chat((["user"], "a"), ("assistant", "b")), "messages[0].role"),
        ({"messages": "a"}, "messages"),
        ({"messages": ["a"]}, "messages[0]"),
        (
            chat(("assistant", "a", 1), ("assistant", "b", 1), token_weights=[1.0]),
            "token_weights",
        ),
        (
            chat(("assistant", "a", 1), ("assistant", "b", 1), advantages=[1.0]),
            "advantages",
        ),
        (
            chat(("assistant", "a", 1), ("assistant", "b", 1), sampler_log_probabilities=[-1.0]),
            "sampler_log_probabilities",
        ),
        (
            chat(("assistant", "a", 1), ("assistant", "b", 1), teacher_messages=[{}]),
            "teacher_messages",
        ),
        (
            chat(("assistant", "a"), teacher_messages=[{"role": "user"}]),
            "teacher_messages[0].content",
        ),
        (
            chat(("assistant", "a"), **{"teacher_messages": chat(("user", "b", 1))["messages"]}),
            "teacher_messages[0].weight",
        ),
        (chat(("assistant", "a"), teacher_messages="b"), "teacher_messages"),
        (chat(("assistant", "a"), teacher_context="b"), "teacher_context"),
        ({"context": "a", "continuation": "b", "teacher_context_ids": [1]}, "teacher_context_ids"),
        ({"context": "a", "continuation": "b", "teacher_context": 1}, "teacher_context"),
    ],
)
def test_what_openai_format_has_and_cannot_be_learned_is_refused_at_its_field(value, field):
    with pytest.raises(InvalidArgument) as refused:
        to_samples(value)
    assert [violation.field for violation in refused.value.violations] == [field]


def test_a_chat_of_several_answers_is_no_single_sample():
    with pytest.raises(InvalidArgument, match="2 answers"):
        to_sample(chat(("user", "a"), ("assistant", "b", 1), ("user", "c"), ("assistant", "d")))


@given(TEXT, IDS)
def test_what_a_teacher_reads_arrives_as_it_was_written(text, ids):
    read = to_sample({"context": "a", "continuation": "b", "teacher_context": text})
    assert read.text == pb.TextSample(context="a", continuation="b", teacher_context=text)
    read = to_sample({"context_ids": [1], "continuation_ids": [2], "teacher_context_ids": ids})
    assert list(read.tokens.teacher_context_ids) == ids
    teacher = chat(("system", text), ("user", "c"))["messages"]
    read = to_sample(chat(("user", "a"), ("assistant", "b"), teacher_messages=teacher))
    assert [(m.role, m.content) for m in read.chat.teacher_messages] == [
        ("system", text),
        ("user", "c"),
    ]
    assert turns_of(read) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("advantages", "taken"),
    [
        (1, [1]), (-0.5, [-0.5]), (np.float32(0.5), [0.5]), (np.array(2.0), [2]),
        ([1, -1.5], [1, -1.5]), (np.array([0.5, 1]), [0.5, 1]), ((), []), (iter([3]), [3]),
        ("1", None), (True, None), ([None], None), ([[1]], None), ({"a": 1}, None),
    ],
)  # fmt: skip
def test_advantages_are_one_number_or_one_a_token(advantages, taken):
    value = {"context": "a", "continuation": "b", "advantages": advantages}
    if taken is None:
        with pytest.raises(InvalidArgument, match=r"^advantages.*(no number|no list of numbers)"):
            to_sample(value)
    else:
        assert list(to_sample(value).advantages) == taken


@given(st.lists(st.floats(-99, 0)))
def test_what_the_sampler_told_arrives_as_it_was_written(log_probabilities):
    value = {"context": "a", "continuation": "b", "sampler_log_probabilities": log_probabilities}
    assert list(to_sample(value).sampler_log_probabilities) == log_probabilities


def test_one_advantage_is_that_of_every_answer_of_a_chat():
    answers = [("assistant", "a", 1), ("user", "b"), ("assistant", "c", 1)]
    made = to_samples(chat(*answers, advantages=0.5, token_weights=[]))
    assert [list(sample.advantages) for sample in made] == [[0.5], [0.5]]


@given(st.dictionaries(st.sampled_from(KEYS), JSON) | JSON)
def test_whatever_json_holds_is_a_sample_or_a_refusal(value):
    try:
        assert isinstance(to_sample(value), pb.Sample)
    except ApolloError as error:
        assert isinstance(error, InvalidArgument) and error.violations


EXPORTED = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "name", "weight"))
EXPORTED["annotations"] = []


def test_keys_that_an_export_leaves_empty_are_as_if_they_were_missing():
    plain = chat(("user", "a"), ("assistant", "b"))
    exported = {
        "messages": [{**message, **EXPORTED} for message in plain["messages"]],
        "tools": None,
        "context": None,
        "weight": None,
    }
    assert to_samples(exported) == to_samples(plain)
    table = {"context": "a", "continuation": "b", "messages": None, "token_weights": None}
    assert to_sample(table) == to_sample(("a", "b"))


@pytest.mark.parametrize(
    ("ids", "taken"),
    [
        ([1, 2.0], [1, 2]),
        ((1, 2), [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (iter([1, 2]), [1, 2]),
        ([True], None),
        (["1"], None),
        ([1.5], None),
        ([None], None),
        ([2**31], None),
        ([10**400], None),
        ([math.nan], None),
        ([[1]], None),
        ("12", None),
        (12, None),
        ({1: 2}, None),
    ],
)
def test_token_ids_are_whole_numbers_however_they_are_listed(ids, taken):
    value = {"context_ids": ids, "continuation_ids": [3]}
    if taken is None:
        with pytest.raises(InvalidArgument, match=r"context_ids.*(token id|list)"):
            to_sample(value)
    else:
        assert list(to_sample(value).tokens.context_ids) == taken


@pytest.mark.parametrize(
    "extras",
    [
        {"weight": "1"}, {"weight": True}, {"weight": 10**400}, {"weight": [1]},
        {"token_weights": 1.0}, {"token_weights": ["1"]}, {"token_weights": [None]},
        {"sampler_log_probabilities": -1.0}, {"sampler_log_probabilities": ["-1"]},
    ],
)  # fmt: skip
def test_a_factor_that_is_no_number_is_refused_at_its_key(extras):
    (key,) = extras
    with pytest.raises(InvalidArgument, match=f"^{key}"):
        to_sample({"context": "a", "continuation": "b", **extras})


def test_half_a_character_is_refused_and_not_printed():
    with pytest.raises(InvalidArgument, match=r"continuation: has half a character, \\ud83d"):
        to_sample(("a", "\ud83d"))
    with pytest.raises(InvalidArgument) as refused:
        to_sample({"context": "a", "continuation": "b", "\ud83d\x1b[31m" * 99: 1})
    assert len(refused.value.message) < 300
    assert refused.value.message.isprintable()


def test_whatever_is_nested_too_deep_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, {"context": deep, "continuation": "b"}, {"messages": deep}, {"id": deep}):
        with pytest.raises(InvalidArgument):
            to_sample(value)


@pytest.mark.parametrize("samples", [{"context": "a", "continuation": "b"}, b"a", None, 3])
def test_what_is_no_list_of_samples_is_told_once(samples):
    with pytest.raises(InvalidArgument, match="samples: is no list of samples") as refused:
        run_spec(samples, {})
    assert len(refused.value.violations) == 1


def test_all_wrong_samples_are_told_at_once_with_the_index_of_the_callers_item():
    samples = [("a", "b"), *[{"prompt": "a"}] * 30]
    with pytest.raises(InvalidArgument) as refused:
        run_spec(samples, {})
    assert refused.value.message == "samples[1]: completion: is missing (and 29 more samples)"
    assert refused.value.__notes__[-1] == "samples[20]: completion: is missing"
    fields = [violation.field for violation in refused.value.violations]
    assert fields == [f"samples[{index}]" for index in range(1, 21)]
