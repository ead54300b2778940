"""Calls that come again with the same request_id: they attach to what the first one began."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from google.protobuf.message import Message

from apollo_grpc.errors import AlreadyExists, InvalidArgument, NotFound

MAX_ID_BYTES = 256
KEPT = 1024


class RepeatedCalls:
    """The last calls with a request_id and what became of them, until the server ends.

    One that failed is begun anew when it comes again. Used on one event loop.
    """

    def __init__(self) -> None:
        self._begun: OrderedDict[tuple[type, str], tuple[bytes, Future[Any]]] = OrderedDict()

    def begin(self, request: Any, start: Callable[[], Future[Any]]) -> Future[Any]:
        """What the call, or the first one with its id, comes to.

        Raises AlreadyExists when that one asked for something else, InvalidArgument for an id that
        is too long.
        """
        if not request.request_id:
            return start()
        if len(request.request_id.encode()) > MAX_ID_BYTES:
            raise InvalidArgument.at("request_id", f"must have at most {MAX_ID_BYTES} bytes")
        key, asked = (type(request), request.request_id), _canonical(request)
        if key not in self._begun or _failed(self._begun[key][1]):
            self._begun[key] = (asked, start())
            self._begun.move_to_end(key)
            while len(self._begun) > KEPT:
                self._begun.popitem(last=False)
        first, future = self._begun[key]
        if first != asked:
            raise AlreadyExists(
                "This request_id began another call; nothing was done. Send a new one, or none.",
                reason="REQUEST_ID_TAKEN",
            )
        return future

    def last(self, request_id: str) -> Future[Any]:
        """What the last call with this id began. Raises NotFound where there was none."""
        for (_, known), (_, future) in reversed(self._begun.items()):
            if known == request_id and request_id:
                return future
        raise NotFound(
            f"No call with the request_id {request_id[:60]!r} came since the server started; "
            "nothing was stopped.",
            reason="REQUEST_NOT_FOUND",
        )


def _canonical(request: Message) -> bytes:
    """By which two requests are compared; what is kept of many does not grow with them."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def _failed(future: Future[Any]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
