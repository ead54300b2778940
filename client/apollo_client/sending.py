"""A call of the blocking client that takes many messages."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from apollo_client.connection import readable
from apollo_client.lifetime import Lifetime
from apollo_grpc.transport import Endpoint

_AHEAD = 2


class Sending:
    """Messages of one call, at most two of them not sent yet, and its answer.

    They are made in the caller's thread; grpc's own takes them from here.

    Args:
        begin: a call of a method.
    """

    def __init__(
        self, begin: Callable[[Any, Any], Any], method: Any, endpoint: Endpoint, lifetime: Lifetime
    ):
        self._endpoint, self._lifetime = endpoint, lifetime
        self._waiting: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._call = begin(method.future, iter(self._waiting.get, None))
        self._call.add_done_callback(self._drain)

    def send(self, message: Any) -> None:
        """Sends one message. Raises the `ApolloError` that ended the call, if one did."""
        if self._call.done():
            self.answer()
        self._waiting.put(message)

    def answer(self) -> Any:
        """The answer, once all was sent. Raises likewise."""
        try:
            if not self._call.done():
                self._waiting.put(None)
            return self._call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            self._lifetime.require_open()
            raise readable(error, self._endpoint) from None

    def _drain(self, _: Any) -> None:
        """Lets both sides go on once nobody sends any more: one waits for room, one for more."""
        with suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)

    def close(self) -> None:
        """Gives up a call that has no answer yet."""
        self._call.cancel()
