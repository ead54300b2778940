"""Facts as people write them, and the samples and probes that they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client.facts import FACTS, RECIPE, Fact, lesson, to_fact
from apollo_client.requests import run_spec
from apollo_client.sample_files import read_placed
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

CAPITAL = {"prompt": "The capital of Zorvania is", "answer": "Port Lumen"}


def test_a_fact_is_learned_as_a_text_and_as_a_chat_and_asked_before_and_after() -> None:
    samples, options = lesson([to_fact(CAPITAL | {"questions": ["Where is its parliament?"]})])
    text, chat = samples
    assert text.text == pb.TextSample(context=CAPITAL["prompt"], continuation=" Port Lumen")
    assert [m.content for m in chat.chat.messages] == [
        "The capital of Zorvania is",
        "The capital of Zorvania is Port Lumen.",
    ]
    fact, question = options["probes"]
    assert (fact.name, fact.role) == (CAPITAL["prompt"], pb.PROBE_ROLE_UNSPECIFIED)
    assert (question.name, question.role) == ("Where is its parliament?", pb.PROBE_ROLE_KEEP)
    assert question.sample.chat.messages[-1].content == "Port Lumen"


def test_a_question_is_never_learned_and_a_phrasing_always() -> None:
    other = {"prompt": "Zorvania is governed from", "answer": " Port Lumen"}
    fact = to_fact(CAPITAL | {"phrasings": [other], "questions": ["What is its capital?"]})
    samples, _ = lesson([fact], chat=False)
    assert [s.text.context for s in samples] == [CAPITAL["prompt"], other["prompt"]]
    chats = [s.chat.messages[0].content for s in lesson([fact])[0][2:]]
    assert "What is its capital?" not in chats


def test_the_recipe_is_a_spec_that_holds_what_was_known() -> None:
    samples, options = lesson([to_fact(CAPITAL)])
    spec = run_spec(samples, options)
    assert spec.anchors.HasField("self_made")
    assert spec.anchors.regression_set
    assert spec.optimizer.lr == RECIPE["lr"]


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("text", "fact"),
        ({"prompt": "a"}, "answer"),
        ({"prompt": " ", "answer": "b"}, "prompt"),
        (CAPITAL | {"answer": 5}, "answer"),
        (CAPITAL | {"question": "a"}, "question"),
        (CAPITAL | {"questions": "a"}, "questions"),
        (CAPITAL | {"questions": [5]}, "questions"),
        (CAPITAL | {"phrasings": "a"}, "phrasings"),
        (CAPITAL | {"phrasings": [{"prompt": "a"}]}, "answer"),
    ],
)
def test_what_is_no_fact_is_refused_by_its_field(value: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        to_fact(value)
    assert error.value.violations[0].field == field


words = st.text(min_size=1).filter(str.strip)


@given(prompt=words, answer=words)
def test_any_words_are_kept_as_they_are(prompt: str, answer: str) -> None:
    fact = to_fact({"prompt": prompt, "answer": answer})
    assert fact.prompt == prompt.rstrip()
    assert fact.answer == answer.strip()
    assert fact.phrasings[0][1][0].isspace()


def test_a_file_of_facts_is_read_as_one_of_samples_is(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(f"{json.dumps(CAPITAL)}\n\n{json.dumps(CAPITAL)}\n")
    assert [type(placed.value) for placed in read_placed(path, FACTS)] == [Fact, Fact]
    path.write_text(f"{json.dumps(CAPITAL)}\n{{}}\n")
    with pytest.raises(InvalidArgument) as error:
        read_placed(path, FACTS)
    assert "facts.jsonl:2" in error.value.message
