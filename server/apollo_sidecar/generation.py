"""The generation of the live weights, in memory that the training server reads before it writes."""

from __future__ import annotations

import mmap
import os

from apollo_grpc.generation import FIRST, SIZE_BYTES
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.sealed_memory import sealed_memory


class GenerationPage:
    """Eight bytes that the worker's own thread alone writes."""

    def __init__(self) -> None:
        self._fd = sealed_memory("apollo-generation", SIZE_BYTES)
        self._page = mmap.mmap(self._fd, SIZE_BYTES)
        self._write(FIRST)

    def _write(self, value: int) -> None:
        self._page[:] = value.to_bytes(SIZE_BYTES, "little")

    @property
    def now(self) -> int:
        """How often it was raised, and one more."""
        return int.from_bytes(self._page[:], "little")

    def advance(self) -> None:
        """Somebody is about to change the weights."""
        self._write(self.now + 1)

    def handle(self) -> pb.MemfdHandle:
        """By which another process opens it."""
        inode = os.fstat(self._fd).st_ino
        return pb.MemfdHandle(pid=os.getpid(), fd=self._fd, inode=inode)
