"""How often somebody else than a training server changed the weights, in memory that both see.

The sidecar's word of a change comes late: a write may have begun by then. What is read here right
before a write is what vLLM's worker says at that moment.
"""

from __future__ import annotations

import mmap
import os

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import weight_export_pb2 as pb

SIZE_BYTES = 8
FIRST = 1


class SharedGeneration:
    """The page of another process, opened to be read.

    Args:
        handle: as in WeightManifest; it must be of a process of this PID namespace.

    Raises FailedPrecondition where that process has ended.
    """

    def __init__(self, handle: pb.MemfdHandle):
        try:
            descriptor = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _gone(error.strerror or str(error)) from None
        try:
            found = os.fstat(descriptor)
            if (found.st_ino, found.st_size) != (handle.inode, SIZE_BYTES):
                raise _gone("it is another file")
            self._page = mmap.mmap(descriptor, SIZE_BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)

    @property
    def now(self) -> int:
        """The generation, in well under a microsecond. Any thread."""
        return int.from_bytes(self._page[:], "little")


def _gone(why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The memory of vLLM's worker cannot be opened ({why}).", reason="BUFFER_GONE"
    )
