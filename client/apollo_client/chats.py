"""Conversations as OpenAI's format has them, and the answers in them that are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apollo_client.sample_values import a_text, is_nothing, shown
from apollo_client.tools import tool_calls
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

_WORDS = ("name", "tool_call_id")
_THOUGHTS = ("reasoning", "reasoning_content", "thinking")
_KEYS = {"role", "content", "weight", "tool_calls", *_WORDS, *_THOUGHTS}
_ROLE_OF = {"tool_call_id": "tool", **dict.fromkeys(("tool_calls", *_THOUGHTS), "assistant")}
_FIELD_OF = dict.fromkeys(_THOUGHTS, "reasoning")


def turns(key: str, messages: Any) -> list[pb.ChatMessage]:
    """The messages of a key. Raises InvalidArgument at the wrong one, as all of these do."""
    if not isinstance(messages, list | tuple):
        raise InvalidArgument.at(key, "is no list of messages")
    return [_message(f"{key}[{index}]", message) for index, message in enumerate(messages)]


def read_turns(messages: Any) -> list[pb.ChatMessage]:
    """The messages that a teacher reads."""
    found = turns("teacher_messages", messages)
    for index, message in enumerate(messages):
        if message.get("weight") is not None:
            raise InvalidArgument.at(f"teacher_messages[{index}].weight", "is for answers to learn")
    return found


def by_answer(messages: Any) -> list[list[pb.ChatMessage]]:
    """The messages up to each answer that is learned."""
    found = turns("messages", messages)
    weights = [message.get("weight") for message in messages]
    if all(weight is None for weight in weights):
        return [found]
    learned = [
        index
        for index, (turn, weight) in enumerate(zip(found, weights, strict=True))
        if _is_learned(index, turn, weight)
    ]
    if not learned:
        raise InvalidArgument.at("messages", "have no answer whose weight is not 0")
    return [found[: index + 1] for index in learned]


def _message(place: str, message: Any) -> pb.ChatMessage:
    """One message; text in parts, as OpenAI's format has it, is put together."""
    if not isinstance(message, Mapping):
        raise InvalidArgument.at(place, "is no object with a role and content")
    fields = {key: value for key, value in message.items() if not is_nothing(value)}
    for key in fields:
        if key not in _KEYS:
            says = "cannot be learned: a message is a role and text, maybe with calls and reasoning"
            raise InvalidArgument.at(f"{place}.{shown(key)}", says)
    calls = tool_calls(f"{place}.tool_calls", fields.get("tool_calls", ()))
    # OpenAI's own answers have null where there is a call alone.
    content = fields.get("content", "") if calls else _required(place, "content", message)
    if isinstance(content, list):
        content = "".join(_text_of(place, part) for part in content)
    found = pb.ChatMessage(
        role=a_text(f"{place}.role", _required(place, "role", fields)),
        content=a_text(f"{place}.content", content),
        tool_calls=calls,
        reasoning=_reasoning(place, fields),
        **{key: a_text(f"{place}.{key}", fields[key]) for key in _WORDS if key in fields},
    )
    _require_role(place, found, fields)
    return found


def _require_role(place: str, message: pb.ChatMessage, fields: Mapping[str, Any]) -> None:
    """Raises InvalidArgument for what vLLM shows of another role's messages alone."""
    for key in fields:
        role = _ROLE_OF.get(key, message.role)
        if role != message.role and getattr(message, _FIELD_OF.get(key, key)):
            raise InvalidArgument.at(f"{place}.{key}", f"is for the role {role} only")


def _required(place: str, key: str, fields: Mapping[str, Any]) -> Any:
    if fields.get(key) is None:
        raise InvalidArgument.at(f"{place}.{key}", "is missing")
    return fields[key]


def _reasoning(place: str, fields: Mapping[str, Any]) -> str:
    """The same thought, by whichever of its names; vLLM's answers may have two of them."""
    found = {key: a_text(f"{place}.{key}", fields[key]) for key in _THOUGHTS if key in fields}
    first, *others = found or ("",)
    for key in others:
        if found[key] != found[first]:
            raise InvalidArgument.at(f"{place}.{key}", f"is another one than {first}")
    return found.get(first, "")


def _text_of(place: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise InvalidArgument.at(f"{place}.content", "has a part that is no text")


def _is_learned(index: int, turn: pb.ChatMessage, weight: Any) -> bool:
    if turn.role != "assistant":
        if weight is not None:
            raise InvalidArgument.at(f"messages[{index}].weight", "is for the assistant's only")
        return False
    if weight is None:
        return True
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise InvalidArgument.at(f"messages[{index}].weight", "must be 0 or 1")
    return bool(weight)
