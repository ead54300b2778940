"""Pages of what a fake server keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from apollo_grpc.errors import FieldViolation, InvalidArgument

T = TypeVar("T")
DEFAULT_SIZE, MAX_SIZE = 50, 1000


def refuse(wrong: Sequence[FieldViolation], reason: str = "") -> None:
    """Raises InvalidArgument with these fields, where there is one."""
    if wrong:
        told = f"{wrong[0].field}: {wrong[0].description}"
        raise InvalidArgument(told, violations=list(wrong), reason=reason)


def wrong_page(request: Any) -> list[FieldViolation]:
    """Wrong fields of a request for a page."""
    wrong = []
    if request.page_size < 0:
        wrong.append(FieldViolation("page_size", "must not be negative"))
    if request.page_token and not request.page_token.isdecimal():
        wrong.append(FieldViolation("page_token", "is none that this server gave"))
    return wrong


def wrong_states(states: Sequence[int], known: Any) -> list[FieldViolation]:
    """Those that are none."""
    return [
        FieldViolation(f"states[{index}]", f"is {state}, which is no state")
        for index, state in enumerate(states)
        if not state or state not in known.values()
    ]


def page_of(
    items: Sequence[T], number: Callable[[T], int], request: Any, *, rising: bool = False
) -> tuple[list[T], str]:
    """A page of items, newest first unless `rising`, and the token of the next one.

    Args:
        number: of an item; it rises with each.
    """
    ordered = sorted(items, key=number, reverse=not rising)
    if request.page_token:
        last = int(request.page_token)
        ordered = [i for i in ordered if (number(i) > last if rising else number(i) < last)]
    size = min(request.page_size or DEFAULT_SIZE, MAX_SIZE)
    page = ordered[:size]
    return page, str(number(page[-1])) if len(ordered) > size else ""
