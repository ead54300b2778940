"""Calls as they come: how long each took and how it ended, and whose span it is within."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from apollo_grpc import traces

Tell = Callable[[str, str, float], None]
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class TraceParents(grpc.aio.ServerInterceptor):
    """What a call begins is within the span that its metadata name (W3C Trace Context)."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Each call has a task of its own, in which its handler runs too."""
        traces.adopt(handler_call_details.invocation_metadata or ())
        return await continuation(handler_call_details)


class RpcSeconds(grpc.aio.ServerInterceptor):
    """Stands before all other interceptors, so that what they refuse is measured too.

    Calls of methods that do not exist are not: callers choose their names.

    Args:
        tell: called with the method as `/package.Service/Method`, the status code's name, and
            seconds from the call's arrival to its end.
    """

    def __init__(self, tell: Tell):
        self._tell = tell

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of one call, which the one after this has made a stream of streams."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return grpc.stream_stream_rpc_method_handler(
            self._timed(handler.stream_stream, handler_call_details.method),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _timed(self, behaviour: Any, method: str) -> Any:
        async def call(messages: Any, context: Any) -> AsyncIterator[Any]:
            began, code = time.monotonic(), ""
            try:
                async with aclosing(behaviour(messages, context)) as answers:
                    async for answer in answers:
                        yield answer
            except (asyncio.CancelledError, GeneratorExit):
                code = grpc.StatusCode.CANCELLED.name
                raise
            finally:
                self._tell(method, code or _code(context), time.monotonic() - began)

        return call


def _code(context: Any) -> str:
    code = context.code()
    return _CODES.get(getattr(code, "value", [code])[0] or 0, "UNKNOWN")
