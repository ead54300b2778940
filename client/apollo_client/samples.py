"""Samples as people write them: dictionaries and pairs of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from apollo_client.sample_values import (
    a_factor,
    a_list,
    a_text,
    is_nothing,
    shown,
    token_ids,
)
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb


@dataclass(frozen=True, slots=True)
class PlacedSample:
    """A sample of a file, and the `FILE:LINE` where it begins."""

    sample: pb.Sample
    place: str


SampleLike: TypeAlias = pb.Sample | PlacedSample | Mapping[str, Any] | tuple[str, str]

# A sample's keys, and the field of Sample.content that they belong to.
_KINDS = {
    "text": ("context", "continuation"),
    "tokens": ("context_ids", "continuation_ids"),
    "chat": ("messages",),
}
_EXTRAS = ("weight", "token_weights")
_KIND_OF = {key: kind for kind, keys in _KINDS.items() for key in keys}
_KNOWN = {kind: {*keys, *_EXTRAS} for kind, keys in _KINDS.items()}
FORMS = (
    '{"context": "...", "continuation": "..."}, '
    '{"context_ids": [...], "continuation_ids": [...]} or '
    '{"messages": [{"role": "user", "content": "..."}, ...]}'
)


def to_sample(value: SampleLike) -> pb.Sample:
    """One sample.

    Args:
        value: a `Sample`; a pair (context, continuation) of text; or a mapping of one of three
            forms: `context` and `continuation`, `context_ids` and `continuation_ids`, `messages`;
            each may have `weight` and `token_weights`. None is the same as a key that is missing.

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
    if isinstance(value, PlacedSample):
        return [value.sample]
    if isinstance(value, tuple) and len(value) == 2:
        value = {"context": value[0], "continuation": value[1]}
    if not isinstance(value, Mapping):
        raise InvalidArgument.at("sample", f"is no object of one of the forms {FORMS}")
    kind, fields = _fields(value)
    if kind != "chat":
        return [_sample(kind, fields)]
    return [_sample(kind, {**fields, "messages": turns}) for turns in _by_answer(fields)]


def _fields(value: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The form of a sample, and its keys that are not null."""
    fields = {key: each for key, each in value.items() if each is not None}
    kinds = {_KIND_OF[key] for key in fields if key in _KIND_OF}
    if len(kinds) != 1:
        raise InvalidArgument.at("sample", f"is not of one of the forms {FORMS}")
    kind = kinds.pop()
    keys = _KINDS[kind]
    for key, each in fields.items():
        if key not in _KNOWN[kind] and not is_nothing(each):
            raise InvalidArgument.at(shown(key), f"is no key of a sample with {' and '.join(keys)}")
    for key in keys:
        if key not in fields:
            raise InvalidArgument.at(key, "is missing")
    return kind, fields


def _by_answer(fields: Mapping[str, Any]) -> list[list[pb.ChatMessage]]:
    """The messages up to each answer that is learned."""
    messages = fields["messages"]
    if not isinstance(messages, list | tuple):
        raise InvalidArgument.at("messages", "is no list of messages")
    turns = [_message(index, message) for index, message in enumerate(messages)]
    weights = [message.get("weight") for message in messages]
    if all(weight is None for weight in weights):
        return [turns]
    learned = [
        index
        for index, (turn, weight) in enumerate(zip(turns, weights, strict=True))
        if _is_learned(index, turn, weight)
    ]
    if not learned:
        raise InvalidArgument.at("messages", "have no answer whose weight is not 0")
    if len(learned) > 1 and fields.get("token_weights"):
        raise InvalidArgument.at("token_weights", "fit one answer; the chat has several to learn")
    return [turns[: index + 1] for index in learned]


def _message(index: int, message: Any) -> pb.ChatMessage:
    """Role and content; text in parts, as OpenAI's format has it, is put together."""
    place = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidArgument.at(place, "is no object with a role and content")
    for key, value in message.items():
        if key not in ("role", "content", "weight") and not is_nothing(value):
            raise InvalidArgument.at(
                f"{place}.{shown(key)}", "cannot be learned: a message is a role and text"
            )
    for key in ("role", "content"):
        if message.get(key) is None:
            raise InvalidArgument.at(f"{place}.{key}", "is missing")
    content = message["content"]
    if isinstance(content, list):
        content = "".join(_text_of(index, part) for part in content)
    return pb.ChatMessage(
        role=a_text(f"{place}.role", message["role"]), content=a_text(f"{place}.content", content)
    )


def _text_of(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise InvalidArgument.at(f"messages[{index}].content", "has a part that is no text")


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


def _sample(kind: str, fields: Mapping[str, Any]) -> pb.Sample:
    keys = _KINDS[kind]
    if kind == "text":
        texts = {key: a_text(key, fields[key]) for key in keys}
        sample = pb.Sample(text=pb.TextSample(**texts))
    elif kind == "tokens":
        ids = {key: token_ids(key, fields[key]) for key in keys}
        sample = pb.Sample(tokens=pb.TokenSample(**ids))
    else:
        sample = pb.Sample(chat=pb.ChatSample(messages=fields["messages"]))
    if "weight" in fields:
        sample.weight = a_factor("weight", fields["weight"])
    if "token_weights" in fields:
        factors = a_list("token_weights", fields["token_weights"], "numbers")
        sample.token_weights.extend(
            [a_factor(f"token_weights[{index}]", factor) for index, factor in enumerate(factors)]
        )
    return sample
