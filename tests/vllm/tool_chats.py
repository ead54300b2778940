"""Chats with tools, calls and thoughts, as bodies that /v1/chat/completions takes."""

from __future__ import annotations

from typing import Any

_CALL = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "tides", "arguments": '{"port": "Lumen, Où", "day": 2}'},
}
_ASKED = {"role": "user", "content": "When is high water?"}
_CALLED = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_TOLD = {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": '{"high": 9.0}'}
_PORT = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
TOOLS = [
    {"type": "function", "function": {"name": "tides", "description": "Où?", "parameters": _PORT}}
]
TOOL_CHATS: dict[str, dict[str, Any]] = {
    "call": {"messages": [_ASKED, _CALLED], "tools": TOOLS},
    "call with a thought": {
        "messages": [_ASKED, {**_CALLED, "reasoning": "Ask the harbour."}],
        "tools": TOOLS,
    },
    "answer after a call": {
        "messages": [
            _ASKED,
            {**_CALLED, "reasoning": "Ask the harbour."},
            _TOLD,
            {"role": "assistant", "content": "At nine.", "reasoning": "It says 9."},
        ],
        "tools": TOOLS,
    },
}
