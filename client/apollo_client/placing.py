"""Where a sample was written: refusals name the line of the user's file, or the item of a list."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from apollo_grpc.errors import ApolloError, FieldViolation, InvalidArgument
from apollo_grpc.transport import MAX_MESSAGE_BYTES
from apollo_grpc.v1 import training_pb2 as pb

# The `FILE:LINE` that a sample of a request came from, or the index of the caller's own item:
# one item may become several samples.
Place: TypeAlias = str | int
# Of each thing in the request's lists, by the list's path.
Places: TypeAlias = Mapping[str, Sequence[Place]]
T = TypeVar("T")

# Below a message's size: the answer of GetRun has more than the spec.
_SPARE_BYTES = 2**16
MAX_SAMPLES_BYTES = MAX_MESSAGE_BYTES - _SPARE_BYTES
MAX_VIOLATIONS = 20
MAX_COUNTED = 10_000
_REST = "train the rest in a run of its own, or 'create_dataset' brings all for one"
# What a sample takes in a request beside its own bytes, at most.
_FRAME_BYTES = 6
_ITEM = re.compile(r"((?:spec\.)?[a-z_.]+)\[(\d+)\]\.?(.*)", re.DOTALL)
_MOST = re.compile(r"at most (\d+)$")
LEARNED, ANCHORS = "spec.samples", "spec.anchors.samples"
EVALUATION, PROBES = "spec.evaluation_samples", "spec.probes"
# How a probe of text calls the parts of its sample.
PROBE_KEYS = {"context": "prompt", "continuation": "expected"}


@dataclass(frozen=True, slots=True)
class Placed(Generic[T]):
    """A sample or a probe of a file, and the `FILE:LINE` where it begins."""

    value: T
    place: str


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


def _refusal(violations: Sequence[FieldViolation], more: str, **told: Any) -> InvalidArgument:
    first = violations[0]
    message = f"{first.field}: {first.description}{more}"
    refusal = InvalidArgument(message, violations=list(violations), **told)
    for other in violations[1:]:
        # Shown below the message of a traceback.
        refusal.add_note(f"{other.field}: {other.description}")
    return refusal


def in_user_words(error: ApolloError, places: Places) -> ApolloError:
    """A server's refusal of a request whose samples and probes came from these places."""
    found = [_moved(violation, places) for violation in error.violations]
    if found == list(error.violations):
        return error
    # Two samples of one line may be wrong in the same way.
    violations = list(dict.fromkeys(found))
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    told = {"reason": error.reason, "metadata": error.metadata, "quota": error.quota}
    return _refusal(violations, more, **told)


def _moved(violation: FieldViolation, places: Places) -> FieldViolation:
    if violation.field in places:
        return _too_many(violation, violation.field, places[violation.field])
    match = _ITEM.fullmatch(violation.field)
    if not match or int(match[2]) >= len(places.get(match[1], ())):
        return violation
    path, rest = match[1], match[3]
    place = places[path][int(match[2])]
    if isinstance(place, int):
        return FieldViolation(_named(place, path) + f".{rest}" * bool(rest), violation.description)
    key = _key(path, rest)
    return FieldViolation(place, f"{key}: " * bool(key) + violation.description)


def _key(path: str, rest: str) -> str:
    """A line has its form's keys themselves: `messages`, where a request has `chat.messages`."""
    rest = rest.removeprefix("sample.")
    key = rest.partition(".")[2] or rest
    return PROBE_KEYS.get(key, key) if path == PROBES else key


def _too_many(violation: FieldViolation, path: str, places: Sequence[Place]) -> FieldViolation:
    most = _MOST.search(violation.description)
    if not most or not 0 < int(most[1]) < len(places):
        return violation
    advice = _advice(path, places, int(most[1]))
    return FieldViolation(_whole(path, places), f"{violation.description}; {advice}")


def require_room(request: pb.TrainRequest, places: Places) -> None:
    """Raises InvalidArgument for more samples than a request holds, with what would fit."""
    total = request.ByteSize()
    if total <= MAX_SAMPLES_BYTES:
        return
    spec, room = request.spec, MAX_SAMPLES_BYTES
    lists: dict[str, Sequence[pb.Sample] | Sequence[pb.Probe]] = {
        PROBES: spec.probes,
        EVALUATION: spec.evaluation_samples,
        ANCHORS: spec.anchors.samples,
        LEARNED: spec.samples,
    }
    for path, items in lists.items():
        for fit, item in enumerate(items):
            room -= item.ByteSize() + _FRAME_BYTES
            if room < 0:
                own = sum(each.ByteSize() + _FRAME_BYTES for each in items)
                where = places.get(path) or range(len(items))
                raise _too_large(path, where, fit, min(own, total), total)


def _too_large(
    path: str, places: Sequence[Place], fit: int, own: int, total: int
) -> InvalidArgument:
    beside = f" beside {_mib(total - own)} of others" if total - own > _SPARE_BYTES else ""
    return InvalidArgument.at(
        _whole(path, places),
        f"holds {_mib(own)} of samples{beside}; a run takes at most {_mib(MAX_SAMPLES_BYTES)}; "
        + _advice(path, places, fit),
        reason="TOO_MANY_SAMPLES",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _advice(path: str, places: Sequence[Place], fit: int) -> str:
    """What to do where only so many fit; those of one item stay together."""
    while 0 < fit < len(places) and places[fit] == places[fit - 1]:
        fit -= 1
    if not fit:
        return f"{_named(places[0], path)} does not fit: shorten it"
    rest = _REST if path == LEARNED else "leave out the rest"
    return f"up to {_named(places[fit - 1], path)} they fit: {rest}"


def _named(place: Place, path: str) -> str:
    return f"{path}[{place}]" if isinstance(place, int) else place


def _whole(path: str, places: Sequence[Place]) -> str:
    """The file, or the list."""
    first = places[0] if places else 0
    return path if isinstance(first, int) else first.rpartition(":")[0]
