"""From the chats of the contract to OpenAI's messages and tools, as vLLM takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from apollo_grpc.v1 import training_pb2
from apollo_sidecar.prompts import Messages, RefusedSample

EMPTY = "is empty: nothing to learn"
NO_OBJECT = "is no JSON object"


def messages_of(turns: Iterable[training_pb2.ChatMessage], path: str) -> Messages:
    """The messages at a path. Raises RefusedSample."""
    return [_message(turn, f"{path}[{index}]") for index, turn in enumerate(turns)]


def tools_of(chat: training_pb2.ChatSample) -> Messages:
    """The functions that may be called. Raises RefusedSample."""
    return [_object(text, f"chat.tools[{index}]") for index, text in enumerate(chat.tools)]


def learned_of(chat: training_pb2.ChatSample) -> training_pb2.ChatMessage:
    """The last answer, which is learned. Raises RefusedSample where there is none."""
    turns = chat.messages
    if not turns or turns[-1].role != "assistant":
        raise RefusedSample(
            "must end with an assistant message: that is what is learned", "chat.messages"
        )
    if len(turns) < 2:
        raise RefusedSample("needs a message before the assistant's", "chat.messages")
    if not (turns[-1].content or turns[-1].tool_calls):
        raise RefusedSample(EMPTY, f"chat.messages[{len(turns) - 1}].content")
    return turns[-1]


def texts_of(turn: training_pb2.ChatMessage) -> dict[str, str]:
    """What of a message reaches the model's tokens, by its path in it."""
    texts = {"content": turn.content, "reasoning": turn.reasoning}
    for index, call in enumerate(turn.tool_calls):
        texts[f"tool_calls[{index}].name"] = call.name
        texts[f"tool_calls[{index}].arguments"] = call.arguments
    return {path: text for path, text in texts.items() if text}


def said_of(turn: training_pb2.ChatMessage) -> list[str]:
    """What of it a template must write, or vLLM would never say it.

    Its reasoning may be left out, and the arguments of a call are written in many ways.
    """
    return [text for text in (turn.content, *(call.name for call in turn.tool_calls)) if text]


def _message(turn: training_pb2.ChatMessage, path: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    for key in ("tool_call_id", "name", "reasoning"):
        if text := getattr(turn, key):
            message[key] = text
    if turn.tool_calls:
        message["tool_calls"] = [
            _call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(turn.tool_calls)
        ]
    return message


def _call(call: training_pb2.ToolCall, path: str) -> dict[str, Any]:
    arguments = call.arguments or "{}"
    # vLLM would show an empty object, and only its log would tell.
    _object(arguments, f"{path}.arguments")
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _object(text: str, path: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedSample(NO_OBJECT, path) from error
    if not isinstance(value, dict):
        raise RefusedSample(NO_OBJECT, path)
    return value
