"""Pages of runs: a token says where the next one begins, and for which choice of runs."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger import Choice
from apollo_trainer.requests.labels import MAX_LABELS

DEFAULT_SIZE, MAX_SIZE = 50, 1000
_TOKEN = struct.Struct(">q8s")


@dataclass(frozen=True)
class Page:
    """At most `size` runs of a choice, from the first, or those beyond the run of a number."""

    choice: Choice
    size: int
    beyond: int | None


def read_page_request(request: pb.ListRunsRequest) -> Page:
    """What a request asks for. Raises InvalidArgument with the path of each wrong field."""
    choice = Choice(
        states=tuple(sorted(set(request.states))),
        labels=dict(sorted(request.labels.items())),
        name=request.name,
        oldest_first=request.order == pb.RUN_ORDER_OLDEST_FIRST,
    )
    violations = []
    if request.page_size < 0:
        violations.append(FieldViolation("page_size", "must not be negative"))
    for index, state in enumerate(request.states):
        if state == pb.RUN_STATE_UNSPECIFIED or state not in pb.RunState.values():
            violations.append(FieldViolation(f"states[{index}]", f"is {state}, which is no state"))
    if request.order not in pb.RunOrder.values():
        violations.append(FieldViolation("order", f"is {request.order}, which is no order"))
    if len(choice.labels) > MAX_LABELS:
        violations.append(FieldViolation("labels", f"are more than {MAX_LABELS}"))
    beyond = _beyond(request.page_token, choice) if request.page_token else None
    if request.page_token and beyond is None:
        violations.append(
            FieldViolation("page_token", "is none that this server gave for this choice of runs")
        )
    if violations:
        first = violations[0]
        raise InvalidArgument(f"{first.field}: {first.description}", violations=violations)
    return Page(choice, min(request.page_size or DEFAULT_SIZE, MAX_SIZE), beyond)


def token_after(number: int, choice: Choice) -> str:
    """The token of the page that follows a run."""
    packed = _TOKEN.pack(number, _checksum(number, choice))
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def _beyond(token: str, choice: Choice) -> int | None:
    try:
        packed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        number, checksum = _TOKEN.unpack(packed)
    except (binascii.Error, ValueError, struct.error):
        return None
    known = checksum == _checksum(number, choice) and token == token_after(number, choice)
    return int(number) if known else None


def _checksum(number: int, choice: Choice) -> bytes:
    return hashlib.sha256(f"runs {number} {choice}".encode()).digest()[:8]
