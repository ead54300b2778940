"""How often somebody else than a training server changed the weights, in memory that both see.

The sidecar's word of a change comes late: a write may have begun by then. What is read here right
before a write is what vLLM's worker says at that moment.
"""

from __future__ import annotations

import mmap
import os

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb

SIZE_BYTES = 8
FIRST = 1


class SharedGeneration:
    """The page of another process, opened to be read.

    Args:
        handle: as in WeightManifest; it must be of a process of this PID namespace.

    Raises as `open_memfd`.
    """

    def __init__(self, handle: pb.MemfdHandle):
        descriptor = open_memfd(handle, SIZE_BYTES, os.O_RDONLY)
        try:
            self._page = mmap.mmap(descriptor, SIZE_BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)

    @property
    def now(self) -> int:
        """The generation, in well under a microsecond. Any thread."""
        return int.from_bytes(self._page[:], "little")


def open_memfd(handle: pb.MemfdHandle, size_bytes: int, access: int) -> int:
    """A descriptor of one's own for a memfd of vLLM's worker, for the caller to close.

    The process may have ended and its pid been given to another: the file is checked first.

    Args:
        access: os.O_RDONLY or os.O_RDWR.

    Raises FailedPrecondition with BUFFER_GONE where it is not there any more, BUFFER_NOT_OPENED
    where this user may not open it.
    """
    try:
        descriptor = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", access | os.O_CLOEXEC)
    except PermissionError as error:
        raise FailedPrecondition(
            f"This user may not open the memory of vLLM's worker ({error.strerror}). Run the "
            "training server as vLLM's user; in containers also with the same security profile.",
            reason="BUFFER_NOT_OPENED",
        ) from None
    except OSError as error:
        raise FailedPrecondition(
            f"The memory of vLLM's worker cannot be opened ({error.strerror}).",
            reason="BUFFER_GONE",
        ) from None
    found = os.fstat(descriptor)
    if (found.st_ino, found.st_size) == (handle.inode, size_bytes):
        return descriptor
    os.close(descriptor)
    raise FailedPrecondition(
        "The memory of vLLM's worker cannot be opened: it is not what its manifest says.",
        reason="BUFFER_GONE",
    )
