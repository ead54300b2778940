"""How a call is refused: its code, and the details that every error of this contract has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from apollo_client.conformance.requirements import (
    BrokenPromiseError,
    NotApplicableError,
    require,
)
from apollo_grpc.statuses import DETAILS_KEY, DOMAIN
from apollo_grpc.v1 import reason_pb2


@dataclass(frozen=True)
class Refusal:
    """What a caller is told.

    Attributes:
        fields: paths of wrong fields.
        metadata: of the ErrorInfo.
        resource: name in the ResourceInfo; empty where there is none.
    """

    code: grpc.StatusCode
    reason: str
    message: str
    fields: list[str]
    metadata: dict[str, str]
    resource: str


def _catalogue() -> Iterator[tuple[str, set[str]]]:
    for value in reason_pb2.Reason.DESCRIPTOR.values:
        info = value.GetOptions().Extensions[reason_pb2.reason_info]
        yield value.name.removeprefix("REASON_"), set(info.codes)


# Names of codes by reason.
CATALOGUE = dict(_catalogue())


def refusal_of(error: Any, what: str) -> Refusal:
    """Reads an error, which must be as the contract says.

    Raises BrokenPromiseError for one without exactly one ErrorInfo, with another domain, or with
    a reason that the catalogue has not, or not with this code; NotApplicableError where the token
    does not let the call be made.
    """
    code, status = error.code(), _status(error, what)
    infos = _details(status, error_details_pb2.ErrorInfo)
    require(
        len(infos) == 1,
        f"{what} ended with {code.name} ({error.details()}) and {len(infos)} ErrorInfo",
    )
    (info,) = infos
    told = f"{what} ended with {code.name}, domain {info.domain!r}, reason {info.reason!r}"
    require(info.domain == DOMAIN, told)
    require(code.name in CATALOGUE.get(info.reason, ()), f"{told}, which the catalogue has not")
    if info.reason == "SCOPE_MISSING":
        raise NotApplicableError(status.message)
    wrong = _details(status, error_details_pb2.BadRequest)
    about = _details(status, error_details_pb2.ResourceInfo)
    return Refusal(
        code,
        info.reason,
        status.message,
        [violation.field for each in wrong for violation in each.field_violations],
        dict(info.metadata),
        about[0].resource_name if about else "",
    )


def _status(error: Any, what: str) -> Any:
    sent = [value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY]
    text = f"{what} ended with {error.code().name} ({error.details()})"
    require(len(sent) == 1, f"{text} and no google.rpc.Status")
    try:
        status = status_pb2.Status.FromString(sent[0])
    except DecodeError:
        raise BrokenPromiseError(f"{text} and bytes that are no google.rpc.Status") from None
    require(status.code == error.code().value[0], f"{text} and a Status of code {status.code}")
    return status


def _details(status: Any, kind: Any) -> list[Any]:
    found = []
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            found.append(detail)
    return found
