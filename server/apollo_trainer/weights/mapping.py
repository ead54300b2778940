"""Maps the sidecar's buffers into this process, and measures what lies where."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apollo_grpc.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.manifest import LiveView, refusal

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Mapping:
    """A buffer of live weights in this process; writes to it are what vLLM computes with next."""

    storage: Any
    inode: int
    size_bytes: int

    def view(self, live: LiveView) -> torch.Tensor:
        """The live parameter, of its shape, dtype and strides."""
        empty = torch.empty(0, dtype=live.dtype)
        offset = live.offset_bytes // live.dtype.itemsize
        return empty.set_(self.storage, offset, live.shape, live.stride)


def map_buffer(buffer: pb.Buffer) -> Mapping:
    """Maps a memfd of the engine's worker, without copying a byte.

    Raises FailedPrecondition when the descriptor no longer is what the manifest describes: the
    process may have ended and its pid been given to another.
    """
    handle = buffer.memfd
    path = f"/proc/{handle.pid}/fd/{handle.fd}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(
            "BUFFER_GONE", f"The memory of vLLM's worker cannot be opened ({error.strerror})."
        ) from None
    try:
        found = os.fstat(descriptor)
        if found.st_ino != handle.inode or found.st_size != buffer.size_bytes:
            raise refusal(
                "BUFFER_GONE", "The memory of vLLM's worker is not what its manifest says."
            )
        # Mapped through our own descriptor, so that it is the file that was just checked.
        storage = torch.UntypedStorage.from_file(
            f"/proc/self/fd/{descriptor}", shared=True, nbytes=buffer.size_bytes
        )
    finally:
        os.close(descriptor)
    return Mapping(storage, handle.inode, buffer.size_bytes)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of parameters inside shared mappings of the engine's memory, and anywhere else."""

    parameters: int
    shared_bytes: int
    copied_bytes: int


def measure(parameters: list[torch.Tensor], inodes: set[int]) -> MemoryUse:
    """Where the parameters' bytes really lie, read from the kernel's list of mappings.

    Args:
        parameters: each one once.
        inodes: of the engine's buffers.
    """
    shared_ranges = _shared_ranges(inodes)
    shared = copied = count = 0
    for parameter in parameters:
        count += parameter.numel()
        size = parameter.numel() * parameter.element_size()
        if any(low <= parameter.data_ptr() < high for low, high in shared_ranges):
            shared += size
        else:
            copied += size
    return MemoryUse(count, shared, copied)


def _shared_ranges(inodes: set[int]) -> list[tuple[int, int]]:
    """Address ranges of shared mappings of the given files (proc(5), /proc/pid/maps)."""
    ranges = []
    for line in MAPS.read_text().splitlines():
        addresses, modes, _, _, inode = line.split(maxsplit=5)[:5]
        if modes[3] == "s" and int(inode) in inodes:
            low, high = addresses.split("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges
