"""Samples as people write them: JSON lines, dictionaries and pairs of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf import json_format

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

SampleLike: TypeAlias = pb.Sample | Mapping[str, Any] | tuple[str, str]

# A sample's keys, and the field of Sample.content that they belong to.
_KINDS = {
    "text": ("context", "continuation"),
    "tokens": ("context_ids", "continuation_ids"),
    "chat": ("messages",),
}
_EXTRAS = ("weight", "token_weights")
_FORMS = (
    '{"context": "...", "continuation": "..."}, '
    '{"context_ids": [...], "continuation_ids": [...]} or '
    '{"messages": [{"role": "user", "content": "..."}, ...]}'
)


def to_sample(value: SampleLike) -> pb.Sample:
    """One sample.

    Args:
        value: a `Sample`; a pair (context, continuation) of text; or a mapping of one of three
            forms: `context` and `continuation`, `context_ids` and `continuation_ids`, `messages`;
            each may have `weight` and `token_weights`.

    Raises InvalidArgument for anything else, and for a chat of several answers to learn.
    """
    samples = to_samples(value)
    if len(samples) != 1:
        raise InvalidArgument.at(
            "messages", f"have {len(samples)} answers to learn: a sample each; use to_samples"
        )
    return samples[0]


def to_samples(value: SampleLike) -> list[pb.Sample]:
    """The samples of one value, as `to_sample` takes it: one, or one for each answer of a chat.

    A chat without weights is one sample: its last message is learned. Where any message has a
    `weight`, as in OpenAI's fine-tuning format, each message of the assistant is learned by
    itself, after all that came before it, unless its weight is 0.

    Raises InvalidArgument.
    """
    if isinstance(value, pb.Sample):
        return [value]
    if isinstance(value, tuple) and len(value) == 2:
        value = {"context": value[0], "continuation": value[1]}
    if not isinstance(value, Mapping):
        raise InvalidArgument.at("sample", f"is no object of one of the forms {_FORMS}")
    return [_from_mapping(each) for each in _by_answer(value)]


def _by_answer(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A chat once for each answer to learn, its messages without weights; all else as it is."""
    messages = value.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return [value]
    plain = [_plain_message(index, message) for index, message in enumerate(messages)]
    if not any("weight" in message for message in messages):
        return [{**value, "messages": plain}]
    learned = [n for n, message in enumerate(messages) if _is_learned(n, message)]
    if not learned:
        raise InvalidArgument.at("messages", "have no answer whose weight is not 0")
    if len(learned) > 1 and value.get("token_weights"):
        raise InvalidArgument.at("token_weights", "fit one answer; the chat has several to learn")
    return [{**value, "messages": plain[: n + 1]} for n in learned]


def _plain_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Role and content; text in parts, as OpenAI's format has it, is put together."""
    for key in message:
        if key not in ("role", "content", "weight"):
            raise InvalidArgument.at(
                f"messages[{index}].{key}", "cannot be learned: a message is a role and text"
            )
    for key in ("role", "content"):
        if message.get(key) is None:
            raise InvalidArgument.at(f"messages[{index}].{key}", "is missing")
    content = message["content"]
    if isinstance(content, list):
        content = "".join(_text_of(index, part) for part in content)
    return {"role": message["role"], "content": content}


def _text_of(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise InvalidArgument.at(f"messages[{index}].content", "has a part that is no text")


def _is_learned(index: int, message: Mapping[str, Any]) -> bool:
    weight = message.get("weight", 1)
    if message["role"] != "assistant":
        if "weight" in message:
            raise InvalidArgument.at(f"messages[{index}].weight", "is for the assistant's only")
        return False
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InvalidArgument.at(f"messages[{index}].weight", "must be 0 or 1")
    return bool(weight)


def _from_mapping(value: Mapping[str, Any]) -> pb.Sample:
    kinds = [kind for kind, keys in _KINDS.items() if any(key in value for key in keys)]
    if len(kinds) != 1:
        raise InvalidArgument.at("sample", f"is not of one of the forms {_FORMS}")
    keys = _KINDS[kinds[0]]
    for key in value:
        if key not in keys and key not in _EXTRAS:
            raise InvalidArgument.at(str(key), f"is no key of a sample with {' and '.join(keys)}")
    for key in keys:
        if value.get(key) is None:
            raise InvalidArgument.at(key, "is missing")
    content = {kinds[0]: {key: value[key] for key in keys}}
    extras = {key: value[key] for key in _EXTRAS if key in value}
    try:
        return json_format.ParseDict(content | extras, pb.Sample())
    except (json_format.ParseError, ValueError, TypeError) as error:
        raise InvalidArgument.at("sample", f"cannot be read: {error}") from error


def read_samples(path: Path) -> list[pb.Sample]:
    """The samples of a JSON lines file; empty lines are passed over.

    Raises InvalidArgument with `FILE:LINE` for each wrong line, and for a file that cannot be
    read or holds no sample.
    """
    try:
        return parse_lines(path.read_text(encoding="utf-8-sig").splitlines(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidArgument.at(str(path), f"cannot be read: {reason}") from error


def parse_lines(lines: Iterable[str], name: str) -> list[pb.Sample]:
    """The samples of JSON lines; `name` is what errors call the file."""
    samples: list[pb.Sample] = []
    violations: list[FieldViolation] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            samples += to_samples(_parse_json(line))
        except InvalidArgument as error:
            violations.append(FieldViolation(f"{name}:{number}", error.message))
    if violations:
        first, more = violations[0], len(violations) - 1
        raise InvalidArgument(
            f"{first.field}: {first.description}" + (f" (and {more} more lines)" if more else ""),
            violations=violations,
        )
    if not samples:
        raise InvalidArgument.at(name, "holds no samples")
    return samples


def _parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InvalidArgument.at("line", f"is no JSON: {error}") from error
