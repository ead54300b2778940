"""Chats with calls, tools and thoughts become the messages that vLLM takes."""

from __future__ import annotations

from typing import Any

import pytest

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.v1 import training_pb2
from examples.byte_model import byte_tokenizer
from tests.plain_prompts import PlainTokens

TAIL = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CALLS = TAIL.replace(
    "m.content | trim",
    "(m.reasoning or '') + (m.content | trim) + (m.tool_calls | tojson if m.tool_calls else '')",
)
CALLS = "{{ tools | tojson if tools else '' }}" + CALLS


def calling(arguments: str = "{}", *tools: str, **turn: Any) -> training_pb2.Sample:
    """A question, and a call of a tool as the answer."""
    call = training_pb2.ToolCall(id="c1", name="tides", arguments=arguments)
    answer = training_pb2.ChatMessage(role="assistant", tool_calls=[call], **turn)
    turns = [training_pb2.ChatMessage(role="user", content="a"), answer]
    return training_pb2.Sample(chat=training_pb2.ChatSample(messages=turns, tools=tools))


def tokenized(template: str, sample: training_pb2.Sample) -> tuple[Any, pb.TokenizedSample]:
    """The tokenizer, and what it makes of the sample."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    (found,) = PlainTokens(tokenizer)([sample])
    return tokenizer, found


def test_a_call_and_a_thought_are_learned_and_tools_read() -> None:
    sample = calling('{"day": 2}', '{"b": 1, "a": 2.0}', reasoning="Hm. ")
    tokenizer, found = tokenized(CALLS, sample)
    assert tokenizer.decode(list(found.continuation_ids)) == (
        'Hm. [{"id": "c1", "type": "function", "function": {"name": "tides", '
        '"arguments": {"day": 2}}}]<|end|>'
    )
    read = tokenizer.decode(list(found.context_ids))
    assert read == '[{"b": 1, "a": 2.0}]<|user|>a<|end|>\n<|assistant|>'


@pytest.mark.parametrize(
    ("sample", "field", "says"),
    [
        (calling("[1]"), "chat.messages[1].tool_calls[0].arguments", "is no JSON object"),
        (calling("{"), "chat.messages[1].tool_calls[0].arguments", "is no JSON object"),
        (calling("{}", "[]"), "chat.tools[0]", "is no JSON object"),
        (
            calling('{"a": "<|end|>"}'),
            "chat.messages[1].tool_calls[0].arguments",
            "vLLM would stop there",
        ),
        (calling(reasoning="<|end|>"), "chat.messages[1].reasoning", "vLLM would stop there"),
    ],
)
def test_a_call_that_vllm_would_not_make_is_refused(
    sample: training_pb2.Sample, field: str, says: str
) -> None:
    _, found = tokenized(CALLS, sample)
    assert found.field == field and says in found.refusal


def test_a_call_that_the_template_does_not_write_is_refused() -> None:
    _, found = tokenized(TAIL, calling())
    assert found.field == "chat.messages" and "does not write the last answer" in found.refusal
