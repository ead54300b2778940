"""Where a sample was written: refusals name the line of the user's file, or the item of a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from apollo_grpc.errors import ApolloError, FieldViolation, InvalidArgument
from apollo_grpc.transport import MAX_MESSAGE_BYTES
from apollo_grpc.v1 import training_pb2 as pb

# The `FILE:LINE` that a sample of a request came from, or the index of the caller's own item:
# one item may become several samples.
Place: TypeAlias = str | int

# Below a message's size: the answer of GetRun has more than the spec.
MAX_SAMPLES_BYTES = MAX_MESSAGE_BYTES - 2**16
MAX_VIOLATIONS = 20
MAX_COUNTED = 10_000
# What a sample takes in a request beside its own bytes, at most.
_FRAME_BYTES = 6
_SAMPLE = re.compile(r"spec\.samples\[(\d+)\]\.?(.*)", re.DOTALL)
_MOST = re.compile(r"at most (\d+)$")


class Violations:
    """What is wrong in many places: the first 20 are kept, and 10,000 are counted."""

    def __init__(self) -> None:
        self._kept: list[FieldViolation] = []
        self.count = 0

    def add(self, place: str, description: str) -> None:
        """One more."""
        self.count += 1
        if self.count <= MAX_VIOLATIONS:
            self._kept.append(FieldViolation(place, description))

    def is_full(self) -> bool:
        """Whether there is no use in looking further."""
        return self.count >= MAX_COUNTED

    def raise_any(self, of: str) -> None:
        """Raises InvalidArgument where there is one; `of` is what the places are, "lines"."""
        if not self._kept:
            return
        least = "at least " * self.is_full()
        more = f" (and {least}{self.count - 1} more {of})" if self.count > 1 else ""
        raise _refusal(self._kept, more)


def _refusal(violations: Sequence[FieldViolation], more: str, reason: str = "") -> InvalidArgument:
    first = violations[0]
    message = f"{first.field}: {first.description}{more}"
    return InvalidArgument(message, violations=list(violations), reason=reason)


def in_user_words(error: ApolloError, places: Sequence[Place]) -> ApolloError:
    """A server's refusal of a request whose samples came from these places."""
    found = [_moved(violation, places) for violation in error.violations]
    if not places or found == list(error.violations):
        return error
    # Two samples of one line may be wrong in the same way.
    violations = list(dict.fromkeys(found))
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return _refusal(violations, more, error.reason)


def _moved(violation: FieldViolation, places: Sequence[Place]) -> FieldViolation:
    if violation.field == "spec.samples":
        return _too_many(violation, places)
    match = _SAMPLE.fullmatch(violation.field)
    if not match or int(match[1]) >= len(places):
        return violation
    place, rest = places[int(match[1])], match[2]
    if isinstance(place, int):
        return FieldViolation(_named(place) + f".{rest}" * bool(rest), violation.description)
    # A line has its form's keys themselves: `messages`, where a request has `chat.messages`.
    key = rest.partition(".")[2] or rest
    return FieldViolation(place, f"{key}: " * bool(key) + violation.description)


def _too_many(violation: FieldViolation, places: Sequence[Place]) -> FieldViolation:
    most = _MOST.search(violation.description)
    if not most or not 0 < int(most[1]) < len(places):
        return violation
    advice = _advice(places, int(most[1]))
    return FieldViolation(_whole(places), f"{violation.description}; {advice}")


def require_room(request: pb.TrainRequest, places: Sequence[Place]) -> None:
    """Raises InvalidArgument for more samples than a request holds, with what would fit."""
    total = request.ByteSize()
    if total <= MAX_SAMPLES_BYTES:
        return
    room, fit = MAX_SAMPLES_BYTES, 0
    for sample in request.spec.samples:
        room -= sample.ByteSize() + _FRAME_BYTES
        if room < 0:
            break
        fit += 1
    else:
        return
    places = places or range(len(request.spec.samples))
    raise InvalidArgument.at(
        _whole(places),
        f"holds {_mib(total)} of samples; a run takes at most {_mib(MAX_SAMPLES_BYTES)}; "
        + _advice(places, fit),
        reason="TOO_MANY_SAMPLES",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _advice(places: Sequence[Place], fit: int) -> str:
    """What to do where only so many samples fit; those of one item stay together."""
    while 0 < fit < len(places) and places[fit] == places[fit - 1]:
        fit -= 1
    if not fit:
        return f"{_named(places[0])} alone is more than that: shorten it"
    return f"up to {_named(places[fit - 1])} they fit: train the rest in a run of its own"


def _named(place: Place) -> str:
    return f"spec.samples[{place}]" if isinstance(place, int) else place


def _whole(places: Sequence[Place]) -> str:
    """The file, or the list."""
    first = places[0] if places else 0
    return "spec.samples" if isinstance(first, int) else first.rpartition(":")[0]
