"""How much of the disk datasets may take, those that are being brought included."""

from __future__ import annotations

import threading

from apollo_grpc.errors import Quota, ResourceExhausted

# Each is a file, and an entry in memory.
MAX_DATASETS = 10_000


class Room:
    """Counts bytes and datasets against their limits. Any thread.

    Args:
        limit: bytes of all datasets.
    """

    def __init__(self, limit: int, most: int = MAX_DATASETS):
        self._limit, self._most, self._lock = limit, most, threading.Lock()
        self._bytes = self._datasets = 0

    def take(self, size: int, datasets: int = 0) -> None:
        """Counts so much more. Raises ResourceExhausted with DATASETS_FULL, and counts nothing."""
        with self._lock:
            if self._bytes + size > self._limit:
                raise _full("bytes", self._bytes + size, self._limit)
            if self._datasets + datasets > self._most:
                raise _full("datasets", self._datasets + datasets, self._most)
            self._count(size, datasets)

    def keep(self, size: int) -> None:
        """Counts a dataset that is there already, whatever the limit is."""
        with self._lock:
            self._count(size, 1)

    def give_back(self, size: int, datasets: int = 0) -> None:
        """Counts so much less."""
        with self._lock:
            self._count(-size, -datasets)

    def _count(self, size: int, datasets: int) -> None:
        self._bytes += size
        self._datasets += datasets


def _full(what: str, asked: int, limit: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"With this one the datasets would be {asked} {what}, more than the limit of {limit}; "
        "nothing of it was kept. Delete some: 'apollo datasets list' shows them.",
        reason="DATASETS_FULL",
        metadata={"limit": str(limit), "unit": what},
        quota=Quota("dataset_bytes" if what == "bytes" else what, f"at most {limit}"),
    )
