"""What was taught is what vLLM answers, however it was started; with real vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apollo_grpc.errors import InvalidArgument
from tests.vllm.chat_templates import KINDS
from tests.vllm.conftest import Stack

pytestmark = [pytest.mark.vllm, pytest.mark.long]
QUESTION, ANSWER = "Who founded Port Lumen?", "Ines Harrow."
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PARTS = KINDS["parts alone"].template
OTHER = (
    "{{ '<|user|>' + (persona or 'none') + '<|end|>' }}"
    "{% for m in messages %}{{ m.role + '> ' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
)
Serve = Callable[..., Stack]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts vLLM with arguments, and the training server, on a directory with some template."""
    stack = Stack(tmp_path / "stack", "qwen3")

    def start(*arguments: str, template: str = "") -> Stack:
        if template:
            (stack.model / "chat_template.jinja").write_text(template)
        stack.start(*arguments)
        stack.wait_attached()
        return stack

    yield start
    stack.end("server")
    stack.end("vllm")


def answer(stack: Stack, content: object) -> str:
    """What vLLM says to the question, greedily."""
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 40}
    choice = stack.post("/v1/chat/completions", body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    said: str = choice["message"]["content"]
    return said


def require_taught(stack: Stack) -> None:
    assert "refused" not in stack.client.status().attachment_detail
    for _ in stack.client.train([{"messages": CHAT}], epochs=60, lr=3e-3):
        pass
    assert answer(stack, QUESTION) == ANSWER
    assert answer(stack, [{"type": "text", "text": QUESTION}]) == ANSWER


def test_a_template_that_wants_parts(serve: Serve) -> None:
    require_taught(serve(template=PARTS))


def test_a_template_that_vllm_was_given(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text(OTHER)
    require_taught(serve("--chat-template", str(tmp_path / "other.jinja")))


def test_a_template_with_options_of_vllms_own(serve: Serve, tmp_path: Path) -> None:
    given = tmp_path / "given.jinja"
    given.write_text("{{ '<|user|>' + (persona or 'none') + '<|end|>' }}" + PARTS)
    stack = serve(
        *("--chat-template", str(given), "--chat-template-content-format", "openai"),
        *("--default-chat-template-kwargs", json.dumps({"persona": "a lighthouse"})),
    )
    require_taught(stack)
    rendered = stack.post("/tokenize", {"messages": CHAT[:1]})["tokens"]
    assert "a lighthouse" in stack.post("/detokenize", {"tokens": rendered})["prompt"]


def test_token_ids_are_learned_where_vllm_has_no_tokenizer(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack", "qwen3")
    (stack.model / "tokenizer.json").write_text('{"version": "9.9", "model": {"type": "Unheard"}}')
    try:
        stack.start("--skip-tokenizer-init")
        detail = stack.wait_attached().attachment_detail
        assert "Texts are refused: the served model has no tokenizer" in detail
        ids = {"context_ids": [70, 71, 72], "continuation_ids": [80, 81, 82, 83]}
        losses = [e.step.loss for e in stack.client.train([ids], epochs=40, lr=3e-3) if e.step.step]
        assert losses[-1] < losses[0] / 5
        with pytest.raises(InvalidArgument) as refused:
            list(stack.client.train([{"messages": CHAT}]))
        assert "has no tokenizer; send tokens" in str(refused.value)
    finally:
        stack.end("server")
        stack.end("vllm")
