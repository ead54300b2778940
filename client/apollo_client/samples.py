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

    Raises InvalidArgument for anything else.
    """
    if isinstance(value, pb.Sample):
        return value
    if isinstance(value, tuple) and len(value) == 2:
        value = {"context": value[0], "continuation": value[1]}
    if not isinstance(value, Mapping):
        raise InvalidArgument.at("sample", f"is no object of one of the forms {_FORMS}")
    return _from_mapping(value)


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
            samples.append(to_sample(_parse_json(line)))
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
