"""The one table between domain errors and gRPC statuses.

Servers raise an `ApolloError`; an interceptor turns it into a google.rpc.Status with exactly one
ErrorInfo (and a BadRequest for bad input). Clients get the same `ApolloError` back and never meet
`grpc.RpcError`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "apollo.dev"
DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field: its path in the request, such as `spec.samples[3].tokens`, and why."""

    field: str
    description: str


class ApolloError(Exception):
    """What went wrong, what was kept and what to do, with a stable reason to branch on.

    Attributes:
        retry_seconds: nothing was done, and the same call may be made again after so many; 0 where
            the server says nothing of that.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        retry_seconds: float = 0.0,
    ):
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.retry_seconds = retry_seconds

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """Wrong fields of the request; empty for all but `InvalidArgument`."""
        return ()


class InvalidArgument(ApolloError):
    """The request is wrong whatever the state of the server; nothing was done."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        *,
        violations: tuple[FieldViolation, ...] | list[FieldViolation] = (),
        reason: str = "",
        metadata: dict[str, str] | None = None,
    ):
        super().__init__(message, reason=reason, metadata=metadata)
        self._violations = tuple(violations)

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """Wrong fields of the request."""
        return self._violations

    @classmethod
    def at(cls, field: str, description: str, *, reason: str = "") -> InvalidArgument:
        """The error for a single wrong field."""
        violation = FieldViolation(field, description)
        return cls(f"{field}: {description}", violations=[violation], reason=reason)


class FailedPrecondition(ApolloError):
    """The request is right but not in this state of the server."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class Unavailable(ApolloError):
    """Something that the request needs is not there now; the same request may work later."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class NotFound(ApolloError):
    """The named thing does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExists(ApolloError):
    """The name is taken by something else."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class ResourceExhausted(ApolloError):
    """A limit was reached; the message holds the limit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "RESOURCE_EXHAUSTED"


class OutOfRange(ApolloError):
    """What was asked for is no longer, or not yet, kept."""

    code = grpc.StatusCode.OUT_OF_RANGE
    default_reason = "OUT_OF_RANGE"


class Aborted(ApolloError):
    """Someone else changed what the request was about; read again and retry."""

    code = grpc.StatusCode.ABORTED
    default_reason = "ABORTED"


class Cancelled(ApolloError):
    """The caller cancelled the call."""

    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class DeadlineExceeded(ApolloError):
    """The call's deadline passed; what the server had accepted goes on."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Unauthenticated(ApolloError):
    """The call carries no valid token."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "TOKEN_REFUSED"


class PermissionDenied(ApolloError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class Unimplemented(ApolloError):
    """This version cannot do it."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNIMPLEMENTED"


class DataLoss(ApolloError):
    """What was read back is not what was written."""

    code = grpc.StatusCode.DATA_LOSS
    default_reason = "DATA_LOSS"


class Internal(ApolloError):
    """A mistake of the server's; its log holds the details under the id in the message."""

    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


class Unknown(ApolloError):
    """The other end gave no reason that this version knows."""


ERROR_OF_CODE: dict[grpc.StatusCode, type[ApolloError]] = {
    error.code: error
    for error in (
        InvalidArgument,
        FailedPrecondition,
        Unavailable,
        NotFound,
        AlreadyExists,
        ResourceExhausted,
        OutOfRange,
        Aborted,
        Cancelled,
        DeadlineExceeded,
        Unauthenticated,
        PermissionDenied,
        Unimplemented,
        DataLoss,
        Internal,
        Unknown,
    )
}


def to_status(error: ApolloError) -> status_pb2.Status:
    """The google.rpc.Status of an error: one ErrorInfo, and what else there is to say.

    That is a BadRequest where fields are wrong, a RetryInfo where the call may be made again.
    """
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


def printable(text: str) -> str:
    """The text with what is no UTF-8, as in the names of files, spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def from_status(status: status_pb2.Status) -> ApolloError:
    """The error that `to_status` made a status from."""
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad_request, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    code = next((c for c in grpc.StatusCode if c.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    error = ERROR_OF_CODE.get(code, Unknown)
    if error is InvalidArgument:
        return InvalidArgument(
            status.message,
            reason=info.reason,
            metadata=dict(info.metadata),
            violations=[
                FieldViolation(v.field, v.description) for v in bad_request.field_violations
            ],
        )
    return error(
        status.message,
        reason=info.reason,
        metadata=dict(info.metadata),
        retry_seconds=retry.retry_delay.ToNanoseconds() / 1e9,
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


def refused_call(call: str, purpose: str, error: OSError) -> str:
    """Words for a call of the system that was refused, as containers do it, and what to do.

    Args:
        purpose: what is done by it, as "weights are shared".
    """
    return (
        f"this system refuses {call} ({error.strerror}), by which {purpose}; allow it in the "
        "container's seccomp profile (Docker: --security-opt seccomp=FILE)"
    )


def code_name(error: ApolloError) -> str:
    """The canonical name of an error's code, such as `INVALID_ARGUMENT`."""
    return str(code_pb2.Code.Name(error.code.value[0]))


def _pack(
    status: status_pb2.Status,
    detail: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.RetryInfo,
) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
