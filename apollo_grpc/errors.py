"""Domain errors, one for each gRPC code.

Servers raise an `ApolloError`, `statuses.py` carries it over the wire, and clients get the same
`ApolloError` back; they never meet `grpc.RpcError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import grpc


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field: its path in the request, such as `spec.samples[3].tokens`, and why."""

    field: str
    description: str


@dataclass(frozen=True)
class Resource:
    """What does not exist, or is there already: "run" or "snapshot", say, and its id or name."""

    kind: str
    name: str


@dataclass(frozen=True)
class Quota:
    """A limit that was reached: its name, as in ServerLimits if that has it, and what it allows."""

    subject: str
    description: str


class ApolloError(Exception):
    """What went wrong, what was kept and what to do, with a stable reason to branch on.

    The reasons that a training server tells are those of `Reason` in the contract.

    Attributes:
        retry_seconds: nothing was done, and the same call may be made again after so many; 0 where
            the server says nothing of that.
        resource: what a NotFound or AlreadyExists is about, where the server says it.
        quota: the limit that was reached, where the server says it.
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
        resource: Resource | None = None,
        quota: Quota | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.retry_seconds = retry_seconds
        self.resource, self.quota = resource, quota

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
        resource: Resource | None = None,
        quota: Quota | None = None,
    ):
        super().__init__(message, reason=reason, metadata=metadata, resource=resource, quota=quota)
        self._violations = tuple(violations)

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """Wrong fields of the request."""
        return self._violations

    @classmethod
    def at(
        cls, field: str, description: str, *, reason: str = "", quota: Quota | None = None
    ) -> InvalidArgument:
        """The error for a single wrong field."""
        violation = FieldViolation(field, description)
        message = f"{field}: {description}"
        return cls(message, violations=[violation], reason=reason, quota=quota)


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
    error.code: error for error in ApolloError.__subclasses__()
}


def printable(text: str) -> str:
    """The text with what is no UTF-8, as in the names of files, spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def refused_call(call: str, purpose: str, error: OSError) -> str:
    """Words for a call of the system that was refused, as containers do it, and what to do.

    Args:
        purpose: what is done by it, as "weights are shared".
    """
    return (
        f"this system refuses {call} ({error.strerror}), by which {purpose}; allow it in the "
        "container's seccomp profile (Docker: --security-opt seccomp=FILE)"
    )
