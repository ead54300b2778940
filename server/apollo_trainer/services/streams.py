"""A limit on open calls of one kind: each one holds memory until its caller leaves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from apollo_grpc.errors import Quota, ResourceExhausted

RETRY_SECONDS = 1.0


class StreamLimit:
    """Counts what is open on one event loop.

    Args:
        limit: of all callers together.
        share: the part of the limit that the callers of one host may have. Those on a unix socket
            are this user's own and may have all.
        what: is counted, as the error names it.
    """

    def __init__(self, limit: int, *, share: float = 1.0, what: str = "streams"):
        self._limit, self._share, self._what = limit, max(1, int(limit * share)), what
        self._open: Counter[str] = Counter()
        self._closed = asyncio.Event()

    @contextmanager
    def one(self, peer: str) -> Iterator[None]:
        """Counts one of a peer, as grpc names it, while the block runs.

        Raises ResourceExhausted at the limit, and at the peer's share of it.
        """
        host = _host(peer)
        self._require_room(host)
        self._open[host] += 1
        try:
            yield
        finally:
            self._open[host] -= 1
            if not self._open[host]:
                del self._open[host]
            self._closed.set()

    async def none_left(self, seconds: float) -> None:
        """Until nothing is open any more, or for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._open:
                    self._closed.clear()
                    await self._closed.wait()

    def _require_room(self, host: str) -> None:
        counted, limit, whose = self._open.total(), self._limit, ""
        if counted < limit and host:
            counted, limit, whose = self._open[host], self._share, " from your host"
        if counted >= limit:
            raise ResourceExhausted(
                f"{counted} {self._what} are open{whose}, which is the limit; nothing was done. "
                "Close some, or try again.",
                reason=f"TOO_MANY_{self._what.upper()}",
                metadata={"limit": str(limit)},
                quota=Quota(self._what, f"at most {limit}{whose}"),
                retry_seconds=RETRY_SECONDS,
            )


def _host(peer: str) -> str:
    """`ipv4:10.0.0.1:5000` without its port, which each connection has another of."""
    return "" if peer.startswith("unix:") else peer.rpartition(":")[0]
