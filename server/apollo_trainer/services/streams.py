"""A limit on open streams: each one holds memory until its reader leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apollo_grpc.errors import ResourceExhausted


class StreamLimit:
    """Counts the streams that are open on one event loop."""

    def __init__(self, limit: int):
        self._limit, self._open = limit, 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Counts one stream while the block runs. Raises ResourceExhausted at the limit."""
        if self._open >= self._limit:
            raise ResourceExhausted(
                f"{self._open} streams are open, which is the limit. Close some and try again.",
                reason="TOO_MANY_STREAMS",
                metadata={"limit": str(self._limit)},
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
