"""JSON as every reader understands it: twin keys, NaN and bottomless nesting are refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from apollo_client.sample_values import shown

_CONTROL = "Text that does not end on its line, or an unescaped control character,"
_SPACE = re.compile(r"[ \t\r\n]+")


class Unreadable(Exception):
    """What is no JSON, in words, and the line of the text, from 1, that is wrong."""

    def __init__(self, message: str, line: int = 1):
        super().__init__(message)
        self.message, self.line = message, line


class Value(NamedTuple):
    """A value, the line where it begins, and why readers disagree about it; "": they do not."""

    value: Any
    line: int
    odd: str


class StrictDecoder(json.JSONDecoder):
    """Notes in `odd` what it met that readers disagree about. Not for two threads at once.

    Args:
        strict: a text must escape its tabs and other control characters, line ends among them.
    """

    def __init__(self, *, strict: bool):
        super().__init__(
            object_pairs_hook=self._object, parse_constant=self._constant, strict=strict
        )
        self.odd = ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            (twin, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            self.odd = f"has the key {shown(twin)} twice in one object"
        return value

    def _constant(self, word: str) -> float:
        self.odd = f"has {word}, which is no number of JSON's"
        return float(word)

    def at(self, text: str, position: int, line: int = 1) -> tuple[Any, int]:
        """The value there, which is on `line`, and the end of the space after it.

        Raises Unreadable.
        """
        self.odd = ""
        try:
            value, end = self.raw_decode(text, position)
        except json.JSONDecodeError as error:
            what = _CONTROL if "control character" in error.msg else error.msg.removesuffix(" at")
            reason = f"is no JSON: {what} at column {error.colno}"
            raise Unreadable(reason, error.lineno) from error
        except RecursionError as error:
            raise Unreadable("is nested too deep", line) from error
        except ValueError as error:
            raise Unreadable("has a number of too many digits", line) from error
        return value, after_space(text, end)


def after_space(text: str, position: int) -> int:
    """Where the next thing begins, at or after a position."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


class ObjectReader:
    """The objects of a text over any lines: of one array, or one after the other.

    Iterating it raises Unreadable, also for values that are no objects.
    """

    def __init__(self, text: str):
        self._text, self._decoder = text, StrictDecoder(strict=True)
        self._position, self._line, self._counted = after_space(text, 0), 1, 0

    def __iter__(self) -> Iterator[Value]:
        if self._passes("["):
            if not self._passes("]"):
                yield self._next()
                while self._passes(","):
                    yield self._next()
                if not self._passes("]"):
                    raise Unreadable("is no JSON: the array does not end", self._line_now())
            if self._position < len(self._text):
                raise Unreadable("has more after its array", self._line_now())
        while self._position < len(self._text):
            yield self._next()

    def _next(self) -> Value:
        line = self._line_now()
        value, self._position = self._decoder.at(self._text, self._position, line)
        if not isinstance(value, dict):
            raise Unreadable("is no object", line)
        return Value(value, line, self._decoder.odd)

    def _passes(self, mark: str) -> bool:
        """Whether the mark comes next; then it is passed."""
        found = self._text.startswith(mark, self._position)
        self._position = after_space(self._text, self._position + found)
        return found

    def _line_now(self) -> int:
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line
