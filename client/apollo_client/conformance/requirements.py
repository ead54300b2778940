"""What a check says where a promise is not kept, or cannot be tried."""

from __future__ import annotations

from typing import Any

MAX_SHOWN = 400


class BrokenPromiseError(Exception):
    """What was seen in place of what is promised."""


class NotApplicableError(Exception):
    """Why a promise cannot be tried on this server as it is."""


def require(kept: Any, seen: str) -> None:
    """Raises BrokenPromiseError with what was seen."""
    if not kept:
        raise BrokenPromiseError(seen)


def require_equal(found: Any, expected: Any, what: str) -> None:
    """Raises BrokenPromiseError with both where they differ."""
    require(found == expected, f"{what}: {shown(found)} in place of {shown(expected)}")


def shown(value: Any) -> str:
    """A value in one line that is not too long."""
    text = " ".join(str(value).split()) or "nothing"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
