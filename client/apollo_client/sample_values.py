"""What the keys of a sample hold, each taken where its meaning is clear."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping, Set
from typing import Any

from apollo_grpc.errors import InvalidArgument

_MAX_SHOWN = 60


def shown(text: object) -> str:
    """A user's word as a message can hold it: short, on one line, without control characters."""
    word = str(text)
    return repr(word[:_MAX_SHOWN])[1:-1] + ("..." if len(word) > _MAX_SHOWN else "")


def written(value: object) -> str:
    """A user's value as a message can hold it, however long or deep it is."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a number of so many digits"


def is_nothing(value: object) -> bool:
    """Whether a key says nothing: exports write null, or an empty list, for what is not there."""
    return value is None or (isinstance(value, list) and not value)


def a_text(place: str, value: Any) -> str:
    """A text that UTF-8 can hold. Raises InvalidArgument at `place`, as all of these do."""
    if not isinstance(value, str):
        raise InvalidArgument.at(place, "is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument.at(
            place, f"has half a character, {ascii(value[error.start])[1:-1]}: a lone surrogate"
        ) from error
    return value


def a_list(place: str, value: Any, of: str) -> list[Any]:
    """What a list, a tuple, an array or an iterator holds."""
    try:
        if not isinstance(value, str | bytes | Mapping | Set):
            return list(value)
    except TypeError:
        pass
    raise InvalidArgument.at(place, f"is no list of {of}")


def token_ids(place: str, value: Any) -> list[int]:
    """Token ids, also where they are numpy's, or whole numbers with a point."""
    ids = a_list(place, value, "token ids")
    # A file may hold millions of them: looked at one by one only where there is a reason.
    if set(map(type, ids)) - {int} or (ids and not _is_int32(min(ids)) & _is_int32(max(ids))):
        return [_id(f"{place}[{index}]", each) for index, each in enumerate(ids)]
    return ids


def _id(place: str, value: Any) -> int:
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    try:
        if not isinstance(whole, bool) and _is_int32(number := operator.index(whole)):
            return number
    except TypeError:
        pass
    raise InvalidArgument.at(place, "is no token id: they are whole numbers below 2147483648")


def _is_int32(number: int) -> bool:
    return -(2**31) <= number < 2**31


def a_factor(place: str, value: Any) -> float:
    """A number; the server says which ones make sense."""
    try:
        if not isinstance(value, bool | str | bytes):
            return float(value)
    except (TypeError, ValueError, ArithmeticError):
        pass
    raise InvalidArgument.at(place, "is no number")


def numbers(place: str, value: Any) -> list[float]:
    """Each of a list."""
    listed = a_list(place, value, "numbers")
    return [a_factor(f"{place}[{index}]", each) for index, each in enumerate(listed)]


def one_or_more_numbers(place: str, value: Any) -> list[float]:
    """One number, or each of a list."""
    try:
        iter(value)
    except TypeError:
        return [a_factor(place, value)]
    return numbers(place, value)
