"""Pages of runs: a token says where the next one begins, and for which states."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

DEFAULT_SIZE, MAX_SIZE = 50, 1000
# Above any run's number.
_ALL = 2**63 - 1
_TOKEN = struct.Struct(">q8s")


@dataclass(frozen=True)
class Page:
    """At most `size` runs with a smaller number than `before`, in one of `states` or in any."""

    before: int
    states: tuple[int, ...]
    size: int


def read_page_request(request: pb.ListRunsRequest) -> Page:
    """What a request asks for. Raises InvalidArgument with the path of each wrong field."""
    states = tuple(sorted(set(request.states)))
    violations = []
    if request.page_size < 0:
        violations.append(FieldViolation("page_size", "must not be negative"))
    for index, state in enumerate(request.states):
        if state == pb.RUN_STATE_UNSPECIFIED or state not in pb.RunState.values():
            violations.append(FieldViolation(f"states[{index}]", f"is {state}, which is no state"))
    before = _before(request.page_token, states) if request.page_token else _ALL
    if before is None:
        violations.append(
            FieldViolation("page_token", "is none that this server gave for these states")
        )
    if violations or before is None:
        first = violations[0]
        raise InvalidArgument(f"{first.field}: {first.description}", violations=violations)
    return Page(before, states, min(request.page_size or DEFAULT_SIZE, MAX_SIZE))


def token_after(number: int, states: Sequence[int]) -> str:
    """The token of the page that follows a run."""
    packed = _TOKEN.pack(number, _checksum(number, states))
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def _before(token: str, states: Sequence[int]) -> int | None:
    try:
        packed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        number, checksum = _TOKEN.unpack(packed)
    except (binascii.Error, ValueError, struct.error):
        return None
    known = checksum == _checksum(number, states) and token == token_after(number, states)
    return int(number) if known else None


def _checksum(number: int, states: Sequence[int]) -> bytes:
    return hashlib.sha256(f"runs {number} {list(states)}".encode()).digest()[:8]
