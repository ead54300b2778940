"""Fields of messages, set from what people write: words for enums, seconds, lists."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

from google.protobuf import duration_pb2

from apollo_client.sample_values import a_list, a_text, shown, written
from apollo_grpc.errors import InvalidArgument

_UNSPECIFIED = "UNSPECIFIED"


def put(message: Any, field: str, value: Any, place: str = "") -> None:
    """Sets a field of a message; an enum by its word, such as `"cosine"`, repeated ones by a list.

    Raises InvalidArgument at `place`, or else at the field's own name, for what it cannot hold.
    """
    place, kind = place or field, message.DESCRIPTOR.fields_by_name[field].enum_type
    now = getattr(message, field)
    if isinstance(now, duration_pb2.Duration):
        now.CopyFrom(duration(place, value))
    elif isinstance(now, MutableMapping):
        if not isinstance(value, Mapping):
            raise InvalidArgument.at(place, f"cannot be {written(value)}: it is names with values")
        for key, each in value.items():
            _try(partial(now.__setitem__, key), each, f"{place}[{shown(key)}]")
    elif hasattr(now, "append"):
        for index, each in enumerate(a_list(place, value, "values")):
            where = f"{place}[{index}]"
            _try(now.append, _number(kind, each, where) if kind else each, where)
    else:
        number = _number(kind, value, place) if kind else value
        _try(lambda each: setattr(message, field, each), number, place)


def _try(take: Any, value: Any, place: str) -> None:
    try:
        take(a_text(place, value) if isinstance(value, str) else value)
    except (ArithmeticError, TypeError, ValueError) as error:
        says = f"cannot be {written(value)}: {shown(error)}"
        raise InvalidArgument.at(place, says) from error


def _number(kind: Any, value: Any, place: str) -> int:
    """The number of an enum's word."""
    first, *rest = kind.values_by_number.values()
    prefix = first.name.removesuffix(_UNSPECIFIED)
    words = {each.name.removeprefix(prefix).lower(): each.number for each in rest}
    if not isinstance(value, str) or value.lower() not in words:
        says = f"cannot be {written(value)}; it is one of {', '.join(words)}"
        raise InvalidArgument.at(place, says)
    return int(words[value.lower()])


def duration(place: str, seconds: float) -> duration_pb2.Duration:
    """A length of time. Raises InvalidArgument at `place` for what is none."""
    length = duration_pb2.Duration()
    _try(lambda value: length.FromNanoseconds(int(value * 1e9)), seconds, place)
    return length
