"""Records of other formats: prompts, instructions as Alpaca's, conversations as ShareGPT's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from apollo_client.chats import turns as read_turns
from apollo_client.sample_values import a_text, written
from apollo_grpc.errors import InvalidArgument

Fields: TypeAlias = Mapping[str, Any]
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_NAME = re.compile(r"\w+")


def told_as(error: InvalidArgument, names: Mapping[str, str]) -> InvalidArgument:
    """The refusal of one value, its field by the name that the caller wrote."""
    (wrong,) = error.violations
    field = _NAME.sub(lambda found: names.get(found[0], found[0]), wrong.field, count=1)
    return InvalidArgument.at(field, wrong.description, reason=error.reason)


def _of_prompt(fields: Fields) -> dict[str, Any]:
    """A continuation of a text, or of a chat where both are lists of messages."""
    rest = {key: each for key, each in fields.items() if key not in ("prompt", "completion")}
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"messages": [*prompt, *completion], **rest}
    return {"context": prompt, "continuation": completion, **rest}


def _of_instruction(fields: Fields) -> dict[str, Any]:
    """A question, with its input below it, and the answer."""
    rest = dict(fields)
    keys = ("system", "instruction", "input", "output")
    system, instruction, more, output = (a_text(key, rest.pop(key, "")) for key in keys)
    asked = f"{instruction}\n\n{more}" if more else instruction
    turns = [("system", system)] * bool(system) + [("user", asked), ("assistant", output)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **rest}


def _of_conversations(fields: Fields) -> dict[str, Any]:
    """A chat; its system's words may stand beside it."""
    rest = dict(fields)
    turns, system = rest.pop("conversations"), a_text("system", rest.pop("system", ""))
    if not isinstance(turns, list | tuple):
        raise InvalidArgument.at("conversations", "is no list of turns")
    messages = [_turn(index, turn) for index, turn in enumerate(turns)]
    if system:
        # Told of before another one moves their places.
        read_turns("conversations", messages)
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, **rest}


def _turn(index: int, turn: Any) -> Any:
    """A turn as a message; one that has a role already is one."""
    if not isinstance(turn, Mapping) or "role" in turn:
        return turn
    rest, place = dict(turn), f"conversations[{index}]"
    speaker, value = rest.pop("from", None), rest.pop("value", None)
    if not isinstance(speaker, str) or speaker not in _ROLES:
        says = f"cannot be {written(speaker)}; it is one of {', '.join(_ROLES)}"
        raise InvalidArgument.at(f"{place}.from", says)
    if value is None:
        raise InvalidArgument.at(f"{place}.value", "is missing")
    return {"role": _ROLES[speaker], "content": value, **rest}


# By a form's first key: what makes one of our own forms of it, and the names of that in it.
REWRITTEN: dict[str, tuple[Callable[[Fields], dict[str, Any]], Mapping[str, str]]] = {
    "prompt": (_of_prompt, {"context": "prompt", "continuation": "completion"}),
    "instruction": (_of_instruction, {}),
    "conversations": (_of_conversations, {"messages": "conversations"}),
}
