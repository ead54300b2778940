"""Chats with tools, calls and thoughts are read as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apollo_client import read_samples, run_spec, to_sample, to_samples
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

ARGUMENTS = {"port": "Où", "day": 2, "exact": 1.0}
CALL = {"id": "c1", "type": "function", "function": {"name": "tides", "arguments": ARGUMENTS}}
TOOL = {"type": "function", "function": {"name": "tides", "parameters": {"required": ["port"]}}}
ASKED = {"role": "user", "content": "When?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Ask."}
TOLD = {"role": "tool", "tool_call_id": "c1", "name": "tides", "content": "9"}
ANSWER = {"role": "assistant", "content": "At nine.", "thinking": "It says 9."}
CHAT = {"messages": [ASKED, CALLED, TOLD, ANSWER], "tools": [TOOL]}


def called(arguments: Any) -> list[dict[str, Any]]:
    return [{**CALL, "function": {"name": "tides", "arguments": arguments}}]


def test_calls_and_thoughts_arrive_as_they_were_written() -> None:
    chat = to_sample(CHAT).chat
    call = pb.ToolCall(id="c1", name="tides", arguments='{"port": "Où", "day": 2, "exact": 1.0}')
    assert list(chat.messages) == [
        pb.ChatMessage(role="user", content="When?"),
        pb.ChatMessage(role="assistant", tool_calls=[call], reasoning="Ask."),
        pb.ChatMessage(role="tool", content="9", tool_call_id="c1", name="tides"),
        pb.ChatMessage(role="assistant", content="At nine.", reasoning="It says 9."),
    ]
    assert [json.loads(tool) for tool in chat.tools] == [TOOL]


def test_arguments_as_text_stay_as_they_are() -> None:
    text = '{"day":2,  "port":null}'
    message = {**CALLED, "tool_calls": called(text)}
    assert (
        to_sample({"messages": [ASKED, message]}).chat.messages[1].tool_calls[0].arguments == text
    )


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), (TOOL,), iter([TOOL])])
def test_tools_may_be_text_or_any_list(tools: Any) -> None:
    assert to_sample({**CHAT, "tools": tools}) == to_sample(CHAT)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tools: Any) -> None:
    assert not to_sample({**CHAT, "tools": tools}).chat.tools


def test_other_forms_and_each_answer_have_the_tools_too() -> None:
    messages = CHAT["messages"]
    prompted = {"prompt": messages[:3], "completion": messages[3:], "tools": [TOOL]}
    assert to_sample(prompted) == to_sample({**CHAT, "messages": messages})
    assert to_sample({"conversations": messages, "tools": [TOOL]}) == to_sample(CHAT)
    first, second = to_samples({**CHAT, "messages": [ASKED, {**CALLED, "weight": 1}, TOLD, ANSWER]})
    assert len(first.chat.messages) == 2 and len(second.chat.messages) == 4
    assert first.chat.tools == second.chat.tools == to_sample(CHAT).chat.tools


def test_a_table_and_lines_are_the_same_chats(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    # The columns of a table are those of all rows: what a row has not is null there.
    plain = {"messages": [ASKED, {"role": "assistant", "content": "At nine."}]}
    other = {"type": "function", "function": {"name": "now", "parameters": {"strict": True}}}
    records = [CHAT, plain, {**CHAT, "tools": [other]}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chats.parquet")
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    expected = [to_sample(record) for record in records]
    assert read_samples(tmp_path / "chats.jsonl") == expected
    assert read_samples(tmp_path / "chats.parquet") == expected
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(tmp_path / "chats.parquet")
    assert list(run_spec(frame, {}).samples) == expected


DEEP: dict[str, Any] = {}
for _ in range(100_000):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({**CALLED, "role": "user", "content": "a"}, "tool_calls"),
        ({**ANSWER, "role": "user"}, "thinking"),
        ({**ANSWER, "tool_call_id": "c1"}, "tool_call_id"),
        ({**ANSWER, "reasoning": "Another."}, "thinking"),
        ({**CALLED, "tool_calls": CALL}, "tool_calls"),
        ({**CALLED, "tool_calls": []}, "content"),
        ({**CALLED, "tool_calls": [{}]}, "tool_calls[0].function"),
        ({**CALLED, "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls[0].type"),
        ({**CALLED, "tool_calls": [{**CALL, "index": 0}]}, "tool_calls[0].index"),
        ({**CALLED, "tool_calls": called("day=2")}, "tool_calls[0].function.arguments"),
        ({**CALLED, "tool_calls": called("[2]")}, "tool_calls[0].function.arguments"),
        ({**CALLED, "tool_calls": called([2])}, "tool_calls[0].function.arguments"),
        ({**CALLED, "tool_calls": called({"a": {1}})}, "tool_calls[0].function.arguments"),
        ({**CALLED, "tool_calls": called({"a": "\ud83d"})}, "tool_calls[0].function.arguments"),
        ({**CALLED, "tool_calls": called(DEEP)}, "tool_calls[0].function.arguments"),
        ({**CALLED, "function_call": {"name": "a"}}, "function_call"),
    ],
)
def test_what_vllm_would_not_show_is_refused_at_its_field(message: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        to_sample({"messages": [ASKED, message]})
    assert [violation.field for violation in refused.value.violations] == [f"messages[1].{field}"]


@pytest.mark.parametrize(
    ("tools", "field"), [("{", "tools"), ([3], "tools[0]"), (TOOL, "tools"), ("[3]", "tools")]
)
def test_what_is_no_list_of_tools_is_refused(tools: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        to_sample({**CHAT, "tools": tools})
    assert [violation.field for violation in refused.value.violations] == [field]
