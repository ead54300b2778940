"""Samples as people write them: dictionaries and pairs of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from apollo_client.chats import by_answer, read_turns
from apollo_client.placing import Placed
from apollo_client.records import REWRITTEN, told_as
from apollo_client.sample_values import (
    a_factor,
    a_text,
    is_nothing,
    numbers,
    one_or_more_numbers,
    shown,
    token_ids,
)
from apollo_client.tools import tools
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

SampleLike: TypeAlias = pb.Sample | Placed[pb.Sample] | Mapping[str, Any] | tuple[str, str]

# A sample's keys, and the field of Sample.content that they belong to.
_KINDS = {
    "text": ("context", "continuation"),
    "tokens": ("context_ids", "continuation_ids"),
    "chat": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "conversations": ("conversations",),
}
_TEACHER = {"text": "teacher_context", "tokens": "teacher_context_ids", "chat": "teacher_messages"}
# What a form may have beside its keys.
_MAY = {
    **{kind: (key,) for kind, key in _TEACHER.items()},
    "chat": ("teacher_messages", "tools"),
    "prompt": ("teacher_context", "teacher_messages", "tools"),
    "instruction": ("input", "system", "teacher_messages"),
    "conversations": ("system", "teacher_messages", "tools"),
}
_LISTS = {
    "token_weights": numbers,
    "advantages": one_or_more_numbers,
    "sampler_log_probabilities": numbers,
}
_KIND_OF = {key: kind for kind, keys in _KINDS.items() for key in keys}
_KNOWN = {kind: {*keys, *_MAY[kind], "weight", *_LISTS} for kind, keys in _KINDS.items()}
KEYS = frozenset().union(*_KNOWN.values())
# What holds each kind, and how its keys are read; those of a chat are by then.
_CONTENT: dict[str, tuple[Callable[..., Any], Callable[[str, Any], Any]]] = {
    "text": (pb.TextSample, a_text),
    "tokens": (pb.TokenSample, token_ids),
    "chat": (pb.ChatSample, lambda _, read: read),
}
FORMS = (
    '{"context": "...", "continuation": "..."}, '
    '{"context_ids": [...], "continuation_ids": [...]}, '
    '{"messages": [{"role": "user", "content": "..."}, ...]}, '
    '{"prompt", "completion"}, {"instruction", "output"} or {"conversations"}'
)


def to_sample(value: SampleLike) -> pb.Sample:
    """One sample.

    Args:
        value: a `Sample`; a pair (context, continuation) of text; or a mapping of one of three
            forms: `context` and `continuation`, `context_ids` and `continuation_ids`, `messages`;
            each may have `weight` and `token_weights`; for a distillation `teacher_context`,
            `teacher_context_ids` or `teacher_messages`; for a policy gradient `advantages`, a
            number or a list, and `sampler_log_probabilities`. None is the same as a key that is
            missing. Messages are OpenAI's: they may have `tool_calls`, the role "tool" and
            `reasoning` (or `reasoning_content`, `thinking`), and `tools` beside them. Forms of
            others are taken as well: `prompt` and `completion`, which is a text or, where both are
            lists of messages, a chat; `instruction`, maybe `input` and `system`, and `output`,
            which is a chat; `conversations` of `from` and `value`.

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
    if isinstance(value, Placed):
        value = value.value
    if isinstance(value, pb.Sample):
        return [value]
    if isinstance(value, tuple) and len(value) == 2:
        value = {"context": value[0], "continuation": value[1]}
    if not isinstance(value, Mapping):
        raise InvalidArgument.at("sample", f"is no object of one of the forms {FORMS}")
    kind, fields = _fields(value)
    if kind in REWRITTEN:
        rewrite, names = REWRITTEN[kind]
        own = rewrite(fields)
        try:
            return to_samples(own)
        except InvalidArgument as error:
            raise told_as(error, names) from error
    if kind != "chat":
        return [_sample(kind, fields)]
    answers = by_answer(fields["messages"])
    if len(answers) > 1:
        _require_for_all(fields)
    if "teacher_messages" in fields:
        fields["teacher_messages"] = read_turns(fields["teacher_messages"])
    if "tools" in fields:
        fields["tools"] = tools("tools", fields["tools"])
    return [_sample(kind, {**fields, "messages": messages}) for messages in answers]


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


def _require_for_all(fields: Mapping[str, Any]) -> None:
    """Raises InvalidArgument for what belongs to one answer of a chat that has several."""
    for key in (*_LISTS, _TEACHER["chat"]):
        # One advantage may be that of all.
        if isinstance(each := fields.get(key), Iterable) and not is_nothing(each):
            raise InvalidArgument.at(key, "fit one answer; the chat has several to learn")


def _sample(kind: str, fields: Mapping[str, Any]) -> pb.Sample:
    made, read = _CONTENT[kind]
    keys = [key for key in (*_KINDS[kind], *_MAY[kind]) if key in fields]
    content: Any = {kind: made(**{key: read(key, fields[key]) for key in keys})}
    sample = pb.Sample(**content)
    if "weight" in fields:
        sample.weight = a_factor("weight", fields["weight"])
    for key, numbers_of in _LISTS.items():
        if key in fields:
            getattr(sample, key).extend(numbers_of(key, fields[key]))
    return sample
