"""The token ids of the training server are those of vLLM's `/tokenize`, by any template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import programs
from tests.vllm.chat_templates import (
    BARE,
    CHATS,
    KINDS,
    MISTRAL,
    NONE,
    OTHER,
    TOKENIZERS,
    TOOLED,
)

WAYS = ("directory", "file", "file and options")
IN_TOOLS = f"{TOOLED} by directory"
# One of each kind that has gone wrong, or was written for another tokenizer.
SOME = ("llama 3", "gemma", "qwen 3", "parts alone", "drops answers")


def by_each_way(*names: str) -> list[str]:
    return [f"{name} by {way}" for name in names for way in WAYS]


def asked(folder: Path, cases: list[str]) -> dict[str, dict[str, Any]]:
    output = programs.run_beside_vllm("tests.vllm.render_templates", folder, *cases)
    found: dict[str, dict[str, Any]] = json.loads(output.splitlines()[-1])
    assert set(found) == set(cases)
    return found


def refusals(answers: dict[str, Any]) -> dict[str, str]:
    """Why what is refused is; all else is learned as vLLM is prompted."""
    for name, answer in answers.items():
        if "refused" not in answer:
            together = answer["context"] + answer["continuation"]
            assert answer["context"] == answer["prompt"], name
            assert answer["context"] == answer.get("completion", answer["prompt"]), name
            assert together == answer["whole"][: len(together)], name
    return {name: answer["refused"] for name, answer in answers.items() if "refused" in answer}


def require_equal(found: dict[str, dict[str, Any]]) -> None:
    for name, answers in found.items():
        refused, kind = refusals(answers), KINDS[name.partition(" by ")[0]]
        assert set(refused) == kind.refused, (name, refused)
        # What a template writes after the end of an answer is none of it.
        last = {answers[chat]["continuation"][-1] for chat in CHATS if chat not in refused}
        assert last <= kind.end_ids() if kind.ends else last.isdisjoint(kind.end_ids()), name


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return asked(tmp_path_factory.mktemp("rendered"), [*by_each_way(*SOME), IN_TOOLS, *TOKENIZERS])


def test_some_templates_by_each_way_to_start_vllm(found: dict[str, dict[str, Any]]) -> None:
    require_equal({name: found[name] for name in by_each_way(*SOME)})


def test_calls_and_thoughts_are_learned_as_the_template_writes_them(
    found: dict[str, dict[str, Any]],
) -> None:
    require_equal({IN_TOOLS: found[IN_TOOLS]})
    tokenizer = KINDS[TOOLED].tokenizer("")

    def text(chat: str, part: str) -> str:
        return str(tokenizer.decode(found[IN_TOOLS][chat][part]))

    call = (
        '<tool_call>\n{"name": "tides", "arguments": {"port": "Lumen, Où", "day": 2}}\n</tool_call>'
    )
    thought = "<think>\nAsk the harbour.\n</think>\n\n"
    assert text("call", "continuation") == f"{call}<|im_end|>"
    assert text("call with a thought", "continuation") == f"{thought}{call}<|im_end|>"
    assert text("answer after a call", "continuation") == (
        "<think>\nIt says 9.\n</think>\n\nAt nine.<|im_end|>"
    )
    asked = text("answer after a call", "context")
    assert f"{thought}{call}" in asked and '<tool_response>\n{"high": 9.0}\n' in asked
    assert '<tools>\n{"type": "function", "function": {"name": "tides"' in asked


@pytest.mark.long
def test_every_template_by_each_way_to_start_vllm(tmp_path: Path) -> None:
    assert len(KINDS) >= 20
    require_equal(asked(tmp_path, by_each_way(*KINDS)))


def test_the_tokenizer_of_another_folder_is_the_one_that_vllm_was_given(
    found: dict[str, dict[str, Any]],
) -> None:
    answers = found[OTHER]
    assert not refusals(answers)
    # The served directory's own knows no such mark, and would spell it.
    assert len(answers["text <|eot_id|>"]["context"]) == 1


def test_without_a_template_texts_are_learned_and_chats_refused(
    found: dict[str, dict[str, Any]],
) -> None:
    refused = refusals(found[BARE])
    assert set(refused) == set(CHATS)
    assert all("no chat template; send text" in why for why in refused.values())


def test_without_a_tokenizer_both_are_refused(found: dict[str, dict[str, Any]]) -> None:
    refused = refusals(found[NONE])
    assert set(refused) == set(found[NONE])
    assert all("has no tokenizer; send tokens" in why for why in refused.values())


def test_mistrals_own_renderer_ends_an_answer_as_it_ends_earlier_ones(
    found: dict[str, dict[str, Any]],
) -> None:
    answers = found[MISTRAL]
    refused = {name: answer["refused"] for name, answer in answers.items() if "refused" in answer}
    # A model of Mistral's that does not think has no tokens for thoughts.
    assert set(refused) == {"call with a thought", "answer after a call"}
    assert all("vLLM refuses it" in why for why in refused.values())
    for name in answers.keys() - refused:
        answer = answers[name]
        assert answer["context"] == answer.get("completion", answer["prompt"]), name
    learned, earlier = answers["plain"]["continuation"], answers["turns"]["context"]
    begin = len(answers["plain"]["context"])
    assert earlier[begin : begin + len(learned)] == learned
