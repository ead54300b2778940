"""A call of the asyncio client that takes many messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc.aio

from apollo_client.connection import readable
from apollo_client.lifetime import Lifetime, is_cancelled
from apollo_grpc.transport import Endpoint


class AsyncSending:
    """Messages of one call, each sent before the next is asked for, and its answer.

    Args:
        begin: a call of a method.
    """

    def __init__(
        self, begin: Callable[[Any, Any], Any], method: Any, endpoint: Endpoint, lifetime: Lifetime
    ):
        self._endpoint, self._lifetime = endpoint, lifetime
        self._ends: list[grpc.RpcError] = []
        self._call = begin(method, None)
        self._call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        """Keeps how the call has ended.

        A message that the server took no more ends it once more in grpc.aio, as INTERNAL, and takes
        the place of what the server said, or is followed by it.
        """
        told = (call.code(), call.details(), call.trailing_metadata())
        code, details, trailers = map(_at_once, told)
        if code is not grpc.StatusCode.INTERNAL:
            self._ends.append(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details))

    async def send(self, message: Any) -> None:
        """Sends one message. Raises the `ApolloError` that ended the call, if one did."""
        try:
            await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            await self.answer()
        except asyncio.CancelledError:
            self._require_going()
            raise

    async def answer(self) -> Any:
        """The answer, once all was sent. Raises likewise."""
        try:
            await self._call.done_writing()
            return await self._call
        except asyncio.CancelledError:
            self._require_going()
            raise
        except grpc.RpcError as error:
            self._lifetime.require_open()
            raise readable(next(iter(self._ends), error), self._endpoint) from None

    def _require_going(self) -> None:
        # Closing ends the call so too, which would pass for this task's own end.
        if not is_cancelled():
            self._lifetime.require_open()

    def close(self) -> None:
        """Gives up a call that has no answer yet."""
        self._call.cancel()


def _at_once(asked: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that has nothing to wait for."""
    try:
        asked.send(None)
    except StopIteration as returned:
        return returned.value
    raise AssertionError("the call has not ended")
