"""Records of other formats are the same samples as our own, or refused in their own words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client import to_sample, to_samples
from apollo_client.forms import SAMPLES
from apollo_grpc.errors import InvalidArgument

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def chat(*turns: tuple[str, str], **extras: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **extras}


def shared(*turns: tuple[str, str], **extras: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **extras}


@given(TEXT, TEXT)
def test_a_prompt_and_its_completion_are_a_text(prompt: str, completion: str) -> None:
    record = {"prompt": prompt, "completion": completion, "id": None}
    assert to_sample(record) == to_sample((prompt, completion))


@given(TEXT, TEXT, TEXT, TEXT)
def test_an_instruction_is_asked_with_its_input(system, instruction, given, output) -> None:
    record = {"instruction": instruction, "input": given, "output": output, "system": system}
    asked = f"{instruction}\n\n{given}" if given else instruction
    first = [("system", system)] if system else []
    assert to_sample(record) == to_sample(chat(*first, ("user", asked), ("assistant", output)))


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_a_conversation_is_a_chat(pairs: list[tuple[str, str]]) -> None:
    theirs = [("system", "Be kind.")], [("system", "Be kind.")]
    for question, answer in pairs:
        theirs[0].extend([("human", question), ("gpt", answer)])
        theirs[1].extend([("user", question), ("assistant", answer)])
    assert to_sample(shared(*theirs[0])) == to_sample(chat(*theirs[1]))
    assert to_sample(shared(*theirs[0][1:], system="Be kind.")) == to_sample(chat(*theirs[1]))


@pytest.mark.parametrize(
    ("record", "same"),
    [
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            chat(("user", "a"), ("assistant", "b")),
        ),
        (
            {"conversations": chat(("user", "a"), ("assistant", "b"))["messages"]},
            chat(("user", "a"), ("assistant", "b")),
        ),
        (
            {"prompt": "a", "completion": "b", "weight": 2, "teacher_context": "c"},
            {"context": "a", "continuation": "b", "weight": 2, "teacher_context": "c"},
        ),
        (
            shared(("human", "a"), ("gpt", "b"), advantages=1.0),
            chat(("user", "a"), ("assistant", "b"), advantages=1.0),
        ),
    ],
)
def test_chats_and_weights_are_kept(record: dict[str, Any], same: dict[str, Any]) -> None:
    assert to_samples(record) == to_samples(same)


def test_answers_with_weights_are_a_sample_each() -> None:
    record = shared(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    for turn in record["conversations"][1::2]:
        turn["weight"] = 1
    assert [len(sample.chat.messages) for sample in to_samples(record)] == [2, 4]


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "a"}, "completion"),
        ({"prompt": 3, "completion": "b"}, "prompt"),
        ({"prompt": "a", "completion": ["b"]}, "completion"),
        ({"prompt": "a", "completion": "b", "answer": "c"}, "answer"),
        ({"prompt": "a", "completion": "b", "teacher_messages": chat()["messages"]}, None),
        ({"prompt": "a", "completion": "b", "teacher_messages": [1]}, "teacher_messages"),
        ({"prompt": "a", "completion": "b", "context": "c"}, "sample"),
        ({"output": "b"}, "instruction"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "input"),
        ({"instruction": "a", "output": 3}, "output"),
        ({"conversations": "a"}, "conversations"),
        ({"conversations": [3]}, "conversations[0]"),
        (shared(("human", "a"), ("tool", "b")), "conversations[1].from"),
        (shared(("human", "a"), (["gpt"], "b")), "conversations[1].from"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value"),
        ({"conversations": [{"from": "gpt", "value": "a", "id": 1}]}, "conversations[0].id"),
        ({"prompt": DEEP, "completion": DEEP}, "messages[0]"),
        ({"conversations": DEEP}, "conversations[0]"),
        (shared((DEEP, "a")), "conversations[0].from"),
        (shared(("human", 3), system="b"), "conversations[0].content"),
        (shared(("human", "a"), system=3), "system"),
    ],
)
def test_what_is_wrong_is_told_by_the_records_own_keys(record: Any, field: str | None) -> None:
    if field is None:
        assert to_sample(record)
        return
    with pytest.raises(InvalidArgument) as refused:
        to_samples(record)
    assert [violation.field for violation in refused.value.violations] == [field]
    assert len(refused.value.message) < 400 and refused.value.message.isprintable()


ASKED = SAMPLES.of_columns({"prompt": "question", "completion": "answer"})


def test_columns_name_what_is_read_and_leave_out_the_rest() -> None:
    record = {"question": "a", "answer": "b", "id": 7, "context": "c"}
    assert ASKED.read(record) == [to_sample(("a", "b"))]
    assert ASKED.read(("a", "b")) == ASKED.read(to_sample(("a", "b"))) == [to_sample(("a", "b"))]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "a"}, "answer: is missing"),
        ({"question": 3, "answer": "b"}, "question: is no text"),
        ({"frage": "a", "antwort": "b"}, "question: is missing; the record has frage, antwort"),
        ({}, "question: is missing; the record has nothing"),
    ],
)
def test_what_is_wrong_is_told_by_the_columns_names(record: Any, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        ASKED.read(record)
    assert refused.value.message == words


@pytest.mark.parametrize(
    ("columns", "field"),
    [({"promt": "question"}, "columns.promt"), ({}, "columns"), ("prompt=question", "columns")],
)
def test_columns_of_no_key_are_refused(columns: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        SAMPLES.of_columns(columns)
    assert refused.value.violations[0].field == field
