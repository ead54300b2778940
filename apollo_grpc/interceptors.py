"""Server interceptors: domain errors become statuses, and TCP callers show a token.

grpc sends the text of an uncaught exception to the caller; without these, paths and internal
text of the server leak.
"""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from apollo_grpc.errors import (
    DETAILS_KEY,
    ERROR_OF_CODE,
    ApolloError,
    FieldViolation,
    Internal,
    InvalidArgument,
    Unauthenticated,
    to_status,
)

log = logging.getLogger(__name__)

# Clients refuse trailers above 8 KiB unless told otherwise, and would see RESOURCE_EXHAUSTED
# instead of the error. The text travels twice: percent-encoded (up to 3 bytes for one), and
# within the status in base64.
MAX_TEXT_BYTES = 1024
MAX_STATUS_BYTES = 3072

# Messages of every service pass here, so request and response types are open.
Handler = Any
Behaviour = Callable[[Any, Any], Any]
Check = Callable[[Any], None]


def _as_domain_error(error: Exception) -> ApolloError:
    """The error itself, or an INTERNAL that names a log entry instead of the exception's text."""
    if isinstance(error, ApolloError):
        return error
    incident = uuid.uuid4().hex[:12]
    log.error("unexpected error, incident %s", incident, exc_info=error)
    return Internal(
        f"The server made a mistake; its log has the details under incident {incident}.",
        metadata={"incident": incident},
    )


def _abort_arguments(error: ApolloError) -> tuple[grpc.StatusCode, str, tuple[Any, ...]]:
    error = _fitting(error)
    details = ((DETAILS_KEY, to_status(error).SerializeToString()),)
    return error.code, error.message, details


def _fitting(error: ApolloError) -> ApolloError:
    """The error with its text cut, and later violations left out, so that it can be received."""
    message = _cut(error.message)
    violations = [FieldViolation(_cut(v.field), _cut(v.description)) for v in error.violations]
    fitting = _with(error, message, violations)
    while violations and to_status(fitting).ByteSize() > MAX_STATUS_BYTES:
        violations = violations[: len(violations) // 2]
        fitting = _with(error, message, violations)
    return fitting


def _with(error: ApolloError, message: str, violations: list[FieldViolation]) -> ApolloError:
    reason, metadata = error.reason, error.metadata
    if isinstance(error, InvalidArgument):
        return InvalidArgument(message, violations=violations, reason=reason, metadata=metadata)
    return ERROR_OF_CODE[error.code](message, reason=reason, metadata=metadata)


def _cut(text: str) -> str:
    encoded = text.encode()
    if len(encoded) <= MAX_TEXT_BYTES:
        return text
    return encoded[: MAX_TEXT_BYTES - 4].decode(errors="ignore") + " ..."


def _rebuild(handler: Handler, wrapper: AioErrors | SyncErrors) -> Handler:
    """The handler with its behaviour wrapped; only reflection streams requests."""
    if handler is None:
        return None
    coders = (_reading(handler.request_deserializer), handler.response_serializer)
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(wrapper.stream(handler.stream_stream), *coders)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(wrapper.stream(handler.unary_stream), *coders)
    return grpc.unary_unary_rpc_method_handler(wrapper.unary(handler.unary_unary), *coders)


class _Unreadable:
    """Stands for a request whose bytes are no message: grpc itself would answer INTERNAL."""


def _reading(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserializer is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            return _Unreadable()

    return read


def _require_readable(request: Any) -> None:
    if isinstance(request, _Unreadable):
        raise InvalidArgument(
            "The bytes of the request are no message of this method; nothing was done.",
            reason="REQUEST_UNREADABLE",
        )


class TokenCheck:
    """Refuses callers over TCP that do not send `authorization: Bearer TOKEN`.

    Unix sockets lie in a folder of the user's alone and need none. Without a token every TCP
    caller is refused.
    """

    def __init__(self, token: str | None):
        self._token = token

    def __call__(self, context: Any) -> None:
        """Raises `Unauthenticated` unless the caller of `context` may go on."""
        if str(context.peer()).startswith("unix:"):
            return
        sent = dict(context.invocation_metadata() or ()).get("authorization", "")
        # A plain comparison would tell, by its time, how much of a guess was right.
        if self._token and hmac.compare_digest(f"Bearer {self._token}".encode(), sent.encode()):
            return
        raise Unauthenticated(
            "Calls over TCP need the header 'authorization: Bearer TOKEN'; nothing was done. "
            "The server's token is in the file 'token' of its state folder."
        )


class AioErrors(grpc.aio.ServerInterceptor):
    """Maps errors of grpc.aio handlers, unary and streaming, after an optional check."""

    def __init__(self, check: Check | None = None):
        self._check = check

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wraps the handler of one call."""
        return _rebuild(await continuation(handler_call_details), self)

    def unary(self, behaviour: Behaviour) -> Callable[..., Any]:
        """The behaviour of a unary call, its errors mapped."""

        async def call(request: Any, context: Any) -> Any:
            try:
                if self._check:
                    self._check(context)
                _require_readable(request)
                result = behaviour(request, context)
                return await result if isinstance(result, Awaitable) else result
            except (grpc.aio.AbortError, grpc.RpcError):
                raise
            except Exception as error:
                await context.abort(*_abort_arguments(_as_domain_error(error)))

        return call

    def stream(self, behaviour: Behaviour) -> Callable[..., Any]:
        """The behaviour of a streaming call, its errors mapped."""

        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                if self._check:
                    self._check(context)
                _require_readable(request)
                responses = behaviour(request, context)
                if isinstance(responses, Awaitable):
                    # It writes through the context, as grpc's own health service does.
                    await responses
                    return
                async for response in responses:
                    yield response
            except (grpc.aio.AbortError, grpc.RpcError):
                raise
            except Exception as error:
                await context.abort(*_abort_arguments(_as_domain_error(error)))

        return call


class SyncErrors(grpc.ServerInterceptor):
    """Maps errors of handlers on a threaded server, unary and streaming."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wraps the handler of one call."""
        return _rebuild(continuation(handler_call_details), self)

    def unary(self, behaviour: Behaviour) -> Callable[..., Any]:
        """The behaviour of a unary call, its errors mapped."""

        def call(request: Any, context: Any) -> Any:
            try:
                _require_readable(request)
                return behaviour(request, context)
            except Exception as error:
                _abort(error, context)

        return call

    def stream(self, behaviour: Behaviour) -> Callable[..., Any]:
        """The behaviour of a streaming call, its errors mapped."""

        def call(request: Any, context: Any) -> Iterator[Any]:
            try:
                _require_readable(request)
                yield from behaviour(request, context)
            except Exception as error:
                _abort(error, context)

        return call


def _abort(error: Exception, context: Any) -> NoReturn:
    code, message, details = _abort_arguments(_as_domain_error(error))
    context.set_trailing_metadata(details)
    context.abort(code, message)
    raise AssertionError("abort returns only by raising")
