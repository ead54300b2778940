"""Server interceptors: domain errors become statuses, and a call is judged before it is read.

grpc sends the text of an uncaught exception to the caller; without these, paths and internal
text of the server leak. It also reads a whole message before it asks anybody: a caller without a
token would cost what the message does.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, nullcontext
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from apollo_grpc.errors import (
    ApolloError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
)
from apollo_grpc.statuses import abort_arguments

log = logging.getLogger(__name__)

# For the largest message at 5 Mbit/s. Whoever is slower keeps others waiting.
READ_SECONDS = 120.0

# Messages of every service pass here, so request and response types are open.
Handler = Any
Behaviour = Callable[[Any, Any], Any]
# Of a call's context and method; without the latter, what any caller may do.
Check = Callable[..., None]
Limit = Callable[[Any], AbstractContextManager[None]]


def _as_domain_error(error: Exception) -> ApolloError:
    """The error itself, or an INTERNAL that names a log entry instead of the exception's text."""
    if isinstance(error, ApolloError):
        return error
    incident = uuid.uuid4().hex[:12]
    about = {"incident": incident}
    log.error("unexpected error, incident %s", incident, exc_info=error, extra=about)
    return Internal(
        f"The server made a mistake; its log has the details under incident {incident}.",
        metadata=about,
    )


def _rebuild(handler: Handler, wrapper: SyncErrors) -> Handler:
    """The handler with its behaviour wrapped."""
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
        raise _unreadable()


def _unreadable() -> InvalidArgument:
    return InvalidArgument(
        "The bytes of the request are no message of this method; nothing was done.",
        reason="REQUEST_UNREADABLE",
    )


class AioErrors(grpc.aio.ServerInterceptor):
    """Maps errors of grpc.aio handlers, and reads a call's message once the call may go on.

    A response that is bytes already is sent as it is.

    Args:
        check: raises for a caller who may not go on; given the call's context and method.
        limit: entered for as long as a call lasts; raises where too many are open.
        turns: by method, as `/package.Service/Method`, for those whose messages may be large: a
            turn is held from before the message is read until the call's first answer.
    """

    def __init__(
        self,
        check: Check | None = None,
        limit: Limit = nullcontext,
        turns: Mapping[str, asyncio.Semaphore] | None = None,
    ):
        self._check, self._limit, self._turns = check, limit, dict(turns or {})

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        # As a stream of requests, of which grpc reads none by itself; on the wire it is the same.
        return grpc.stream_stream_rpc_method_handler(
            self._call(handler, handler_call_details.method),
            None,
            _writing(handler.response_serializer),
        )

    def _call(self, handler: Handler, method: str) -> Behaviour:
        turn = self._turns.get(method)

        async def call(messages: Any, context: Any) -> AsyncIterator[Any]:
            try:
                if self._check:
                    self._check(context, method)
                with self._limit(context):
                    async with AsyncExitStack() as held:
                        if turn:
                            await held.enter_async_context(turn)
                        # Without a name for it, nothing here keeps the message.
                        answers = _answers(handler, await _read(handler, context), context)
                        async with aclosing(answers):
                            async for answer in answers:
                                await held.aclose()
                                yield answer
            except (grpc.aio.AbortError, grpc.RpcError):
                raise
            except Exception as error:
                await context.abort(*abort_arguments(_as_domain_error(error)))

        return call


async def _read(handler: Handler, context: Any) -> Any:
    """The one message of a call, or, of a method that takes many, all as they come."""
    if handler.request_streaming:
        return _each(handler, context)
    data = await _message(context)
    if data is grpc.aio.EOF:
        raise _unreadable()
    return _parsed(handler, data)


async def _each(handler: Handler, context: Any) -> AsyncIterator[Any]:
    while (data := await _message(context)) is not grpc.aio.EOF:
        yield _parsed(handler, data)


async def _message(context: Any) -> Any:
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await context.read()
    except TimeoutError:
        raise DeadlineExceeded(
            f"The request did not arrive within {READ_SECONDS:g} s; nothing was done.",
            reason="REQUEST_TOO_SLOW",
        ) from None


def _parsed(handler: Handler, data: bytes) -> Any:
    try:
        return handler.request_deserializer(data) if handler.request_deserializer else data
    except DecodeError:
        raise _unreadable() from None


async def _answers(handler: Handler, request: Any, context: Any) -> AsyncGenerator[Any, None]:
    """What a handler of any kind answers; a streaming one may write through the context itself."""
    unary = handler.unary_unary or handler.stream_unary
    answer = (unary or handler.unary_stream or handler.stream_stream)(request, context)
    # A run's stream outlives its submission by hours.
    del request
    if isinstance(answer, AsyncIterator):
        async for each in answer:
            yield each
        return
    answer = await answer if isinstance(answer, Awaitable) else answer
    if unary:
        yield answer


def _writing(serializer: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    if serializer is None:
        return None
    return lambda answer: answer if isinstance(answer, bytes) else serializer(answer)


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
    code, message, details = abort_arguments(_as_domain_error(error))
    context.set_trailing_metadata(details)
    context.abort(code, message)
    raise AssertionError("abort returns only by raising")
