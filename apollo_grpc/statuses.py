"""The one table between domain errors and gRPC statuses.

An error travels as a google.rpc.Status with exactly one ErrorInfo, with a BadRequest where fields
are wrong, and with a RetryInfo where the call may be made again.
"""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from apollo_grpc.errors import (
    ERROR_OF_CODE,
    ApolloError,
    FieldViolation,
    InvalidArgument,
    Unknown,
    printable,
)

DOMAIN = "apollo.dev"
DETAILS_KEY = "grpc-status-details-bin"
# Clients refuse trailers above 8 KiB unless told otherwise, and would see RESOURCE_EXHAUSTED
# instead of the error. The text travels twice: percent-encoded (up to 3 bytes for one), and
# within the status in base64.
MAX_TEXT_BYTES = 1024
MAX_STATUS_BYTES = 3072


def to_status(error: ApolloError) -> status_pb2.Status:
    """The google.rpc.Status of an error, however long that is."""
    metadata = {key: printable(value) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    status = status_pb2.Status(code=error.code.value[0], message=printable(error.message))
    _pack(status, info)
    if error.violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad_request.field_violations.add(
                field=printable(violation.field), description=printable(violation.description)
            )
        _pack(status, bad_request)
    if error.retry_seconds:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_seconds * 1e9))
        _pack(status, retry)
    return status


def from_status(status: status_pb2.Status) -> ApolloError:
    """The error that `to_status` made a status from."""
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad_request, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    code = next((c for c in grpc.StatusCode if c.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    return _made(
        ERROR_OF_CODE.get(code, Unknown),
        status.message,
        [FieldViolation(v.field, v.description) for v in bad_request.field_violations],
        retry.retry_delay.ToNanoseconds() / 1e9,
        reason=info.reason,
        metadata=dict(info.metadata),
    )


def from_rpc_error(error: Any) -> ApolloError:
    """The domain error behind a failed call, of grpc or grpc.aio.

    A status without details, as the transport itself makes them, keeps its code and text.
    """
    trailers = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in trailers or ():
        if key == DETAILS_KEY:
            # Details that another program garbled must not hide the status itself.
            with contextlib.suppress(DecodeError):
                return from_status(status_pb2.Status.FromString(value))
    code: grpc.StatusCode = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else None) or str(error)
    return from_status(status_pb2.Status(code=code.value[0], message=details))


def abort_arguments(error: ApolloError) -> tuple[grpc.StatusCode, str, tuple[Any, ...]]:
    """Code, text and trailers that end a call with this error, short enough to be received."""
    error = _fitting(error)
    details = ((DETAILS_KEY, to_status(error).SerializeToString()),)
    return error.code, error.message, details


def _fitting(error: ApolloError) -> ApolloError:
    """The error with its text cut, and later violations left out, so that it can be received."""
    kind, message = ERROR_OF_CODE[error.code], _cut(error.message)
    given: dict[str, Any] = {"reason": error.reason, "metadata": error.metadata}
    violations = [FieldViolation(_cut(v.field), _cut(v.description)) for v in error.violations]
    fitting = _made(kind, message, violations, error.retry_seconds, **given)
    while violations and to_status(fitting).ByteSize() > MAX_STATUS_BYTES:
        violations = violations[: len(violations) // 2]
        fitting = _made(kind, message, violations, error.retry_seconds, **given)
    return fitting


def _made(
    kind: type[ApolloError],
    message: str,
    violations: list[FieldViolation],
    retry_seconds: float,
    **given: Any,
) -> ApolloError:
    """An error of this kind. Wrong fields are of a request that no retry makes right."""
    if issubclass(kind, InvalidArgument):
        return kind(message, violations=violations, **given)
    return kind(message, retry_seconds=retry_seconds, **given)


def _cut(text: str) -> str:
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= MAX_TEXT_BYTES:
        return encoded.decode()
    return encoded[: MAX_TEXT_BYTES - 4].decode(errors="ignore") + " ..."


def _pack(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
