"""Samples are read as they were written, or refused with the place of the mistake."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client import read_samples, to_sample, to_samples
from apollo_client.samples import parse_lines
from apollo_grpc.errors import ApolloError, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
IDS = st.lists(st.integers(0, 2**31 - 1))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = ("context", "continuation", "context_ids", "continuation_ids", "messages", "weight")


@given(TEXT, TEXT)
def test_text_arrives_as_it_was_written(context, continuation):
    line = json.dumps({"context": context, "continuation": continuation})
    (sample,) = parse_lines([line], "file")
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
    line = json.dumps(
        chat(
            ("system", "be kind"), ("user", "a"), ("assistant", "b", 0),
            ("user", "c"), ("assistant", "d", 1), ("user", "e"), ("assistant", "f"),
            weight=0.5,
        )
    )  # fmt: skip
    first, second = parse_lines([line], "file")
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
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].tool_calls"),
        (chat(("user", "a"), ("assistant", "b"), tools=[]), "tools"),
        (
            chat(("assistant", "a", 1), ("assistant", "b", 1), token_weights=[1.0]),
            "token_weights",
        ),
    ],
)
def test_what_openai_format_has_and_cannot_be_learned_is_refused_at_its_field(value, field):
    with pytest.raises(InvalidArgument) as refused:
        to_samples(value)
    assert [violation.field for violation in refused.value.violations] == [field]


def test_a_chat_of_several_answers_is_no_single_sample():
    with pytest.raises(InvalidArgument, match="2 answers"):
        to_sample(chat(("user", "a"), ("assistant", "b", 1), ("user", "c"), ("assistant", "d")))


@given(st.dictionaries(st.sampled_from(KEYS), JSON) | JSON)
def test_whatever_json_holds_is_a_sample_or_a_refusal(value):
    try:
        assert isinstance(to_sample(value), pb.Sample)
    except ApolloError as error:
        assert isinstance(error, InvalidArgument) and error.violations


@given(st.text(max_size=40))
def test_whatever_a_line_holds_is_a_sample_or_a_refusal_with_its_place(line):
    try:
        parse_lines([line], "file")
    except InvalidArgument as error:
        assert error.violations[0].field.split(":")[0] == "file"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"context": "a", "continuatoin": "b"}', "continuatoin"),
        ('{"context": "a"}', "continuation"),
        ('{"context": "a", "continuation": null}', "continuation"),
        ('{"context": "a", "continuation_ids": [1]}', "forms"),
        ('{"prompt": "a"}', "forms"),
        ('["a", "b"]', "forms"),
        ('{"context_ids": ["x"], "continuation_ids": [1]}', "context_ids"),
        ('{"context_ids": [1], "continuation_ids": [4294967296]}', "continuation_ids"),
        ('{"context": 3, "continuation": "b"}', "context"),
        ("{", "no JSON"),
    ],
)
def test_a_wrong_line_is_told_with_its_number_and_the_mistake(line, word):
    good = '{"context": "a", "continuation": "b"}'
    with pytest.raises(InvalidArgument) as refused:
        parse_lines([good, "", line, good, line], "facts.jsonl")
    fields = [violation.field for violation in refused.value.violations]
    assert fields == ["facts.jsonl:3", "facts.jsonl:5"]
    assert word in refused.value.message


def test_a_byte_order_mark_and_empty_lines_are_passed_over(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"context": "a", "continuation": "b"}\r\n\n')
    assert [sample.text.context for sample in read_samples(path)] == ["a"]


@pytest.mark.parametrize(("content", "word"), [(b"\n", "no samples"), (b"\xff\xfe", "UTF-8")])
def test_a_file_without_samples_is_refused(tmp_path, content, word):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=word):
        read_samples(path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidArgument, match="No such file") as refused:
        read_samples(tmp_path / "none.jsonl")
    assert "none.jsonl" in refused.value.message
