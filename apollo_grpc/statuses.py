"""The one table between domain errors and gRPC statuses.

An error travels as a google.rpc.Status with exactly one ErrorInfo, and with a BadRequest where
fields are wrong, a RetryInfo where the call may be made again, a QuotaFailure where a limit was
reached, a ResourceInfo where the error is about something that has a name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2 as rpc
from google.rpc import status_pb2

from apollo_grpc.errors import (
    ERROR_OF_CODE,
    ApolloError,
    FieldViolation,
    InvalidArgument,
    Quota,
    Resource,
    Unknown,
    printable,
)

DOMAIN = "apollo.dev"
DETAILS_KEY = "grpc-status-details-bin"
# Clients refuse trailers above 8 KiB unless told otherwise, and would see RESOURCE_EXHAUSTED
# instead of the error. The text travels twice: percent-encoded (up to 3 bytes for one), and
# within the status in base64.
MAX_TEXT_BYTES = 1024
MAX_NAME_BYTES = 256
MAX_STATUS_BYTES = 3072


def to_status(error: ApolloError) -> status_pb2.Status:
    """The google.rpc.Status of an error, however long that is."""
    status = status_pb2.Status(code=error.code.value[0], message=printable(error.message))
    for detail in _details(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details(error: ApolloError) -> Iterator[Message]:
    metadata = {key: printable(value) for key, value in error.metadata.items()}
    yield rpc.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    if error.violations:
        request = rpc.BadRequest()
        for v in error.violations:
            field, description = printable(v.field), printable(v.description)
            request.field_violations.add(field=field, description=description)
        yield request
    if error.retry_seconds:
        retry = rpc.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_seconds * 1e9))
        yield retry
    if quota := error.quota:
        failure = rpc.QuotaFailure()
        failure.violations.add(subject=quota.subject, description=printable(quota.description))
        yield failure
    if resource := error.resource:
        name = printable(resource.name)
        yield rpc.ResourceInfo(resource_type=resource.kind, resource_name=name)


def from_status(status: status_pb2.Status) -> ApolloError:
    """The error that `to_status` made a status from."""
    info, bad_request = rpc.ErrorInfo(), rpc.BadRequest()
    retry, quota = rpc.RetryInfo(), rpc.QuotaFailure()
    resource = rpc.ResourceInfo()
    for detail in status.details:
        for message in (info, bad_request, retry, quota, resource):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    code = next((c for c in grpc.StatusCode if c.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    limits = [Quota(v.subject, v.description) for v in quota.violations]
    about = Resource(resource.resource_type, resource.resource_name)
    return _made(
        ERROR_OF_CODE.get(code, Unknown),
        status.message,
        [FieldViolation(v.field, v.description) for v in bad_request.field_violations],
        retry.retry_delay.ToNanoseconds() / 1e9,
        reason=info.reason,
        metadata=dict(info.metadata),
        quota=limits[0] if limits else None,
        resource=about if resource.ByteSize() else None,
    )


def from_rpc_error(error: Any) -> ApolloError:
    """The domain error behind a failed call, of grpc or grpc.aio.

    A status without details, as the transport itself makes them, keeps its code and text.
    """
    for value in _sent(error):
        # Details that another program garbled must not hide the status itself.
        with contextlib.suppress(DecodeError):
            return from_status(status_pb2.Status.FromString(value))
    code: grpc.StatusCode = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else None) or str(error)
    return from_status(status_pb2.Status(code=code.value[0], message=details))


def is_told(error: Any) -> bool:
    """Whether a program ended the call, as grpc raises it, and not the transport."""
    return bool(_sent(error))


def _sent(error: Any) -> list[bytes]:
    trailers = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    return [value for key, value in trailers or () if key == DETAILS_KEY]


def abort_arguments(error: ApolloError) -> tuple[grpc.StatusCode, str, tuple[Any, ...]]:
    """Code, text and trailers that end a call with this error, short enough to be received."""
    error = _fitting(error)
    details = ((DETAILS_KEY, to_status(error).SerializeToString()),)
    return error.code, error.message, details


def _fitting(error: ApolloError) -> ApolloError:
    """The error with its text cut, and later violations left out, so that it can be received."""
    kind, message = ERROR_OF_CODE[error.code], _cut(error.message)
    given: dict[str, Any] = {"reason": error.reason, "metadata": error.metadata}
    if quota := error.quota:
        given["quota"] = Quota(quota.subject, _cut(quota.description, MAX_NAME_BYTES))
    if resource := error.resource:
        given["resource"] = Resource(resource.kind, _cut(resource.name, MAX_NAME_BYTES))
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


def _cut(text: str, most: int = MAX_TEXT_BYTES) -> str:
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= most:
        return encoded.decode()
    return encoded[: most - 4].decode(errors="ignore") + " ..."
