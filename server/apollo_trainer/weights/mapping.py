"""Maps the sidecar's buffers into this process, and measures what lies where."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.generation import open_memfd
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.cuda_mapping import device_of, open_ipc_handle, own_segments
from apollo_trainer.weights.live_view import LiveView
from apollo_trainer.weights.manifest import refusal

MAPS = Path("/proc/self/maps")
Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Mapping:
    """A buffer of live weights in this process; writes to it are what vLLM computes with next.

    Attributes:
        inode: of the memfd behind it; None for memory of a GPU.
    """

    storage: Any
    size_bytes: int
    inode: int | None = None

    def view(self, live: LiveView) -> torch.Tensor:
        """The live parameter, of its shape, dtype and strides."""
        empty = torch.empty(0, dtype=live.dtype, device=self.storage.device)
        offset = live.offset_bytes // live.dtype.itemsize
        return empty.set_(self.storage, offset, live.shape, live.stride)


def map_buffers(buffers: Iterable[pb.Buffer]) -> dict[int, Mapping]:
    """All buffers of a checked manifest by id, without copying a byte.

    Raises FailedPrecondition when one no longer is what the manifest describes.
    """
    return {buffer.buffer_id: map_buffer(buffer) for buffer in buffers}


def map_buffer(buffer: pb.Buffer) -> Mapping:
    """Maps one buffer. Raises as `map_buffers` does."""
    if buffer.WhichOneof("handle") == "cuda_ipc":
        return Mapping(_open_on_gpu(buffer), buffer.size_bytes)
    return _map_memfd(buffer)


def _open_on_gpu(buffer: pb.Buffer) -> Any:
    device = device_of([buffer])
    assert device is not None
    try:
        return open_ipc_handle(buffer, device)
    except RuntimeError as error:
        raise refusal(
            "BUFFER_GONE",
            f"CUDA does not open the memory of vLLM's worker ({str(error).splitlines()[0]}).",
        ) from None


def _map_memfd(buffer: pb.Buffer) -> Mapping:
    """Maps a memfd of the engine's worker."""
    handle = buffer.memfd
    try:
        descriptor = open_memfd(handle, buffer.size_bytes, os.O_RDWR)
    except FailedPrecondition as error:
        raise refusal(error.reason, error.message) from None
    try:
        # Mapped through our own descriptor, so that it is the file that was just checked.
        storage = torch.UntypedStorage.from_file(
            f"/proc/self/fd/{descriptor}", shared=True, nbytes=buffer.size_bytes
        )
    except RuntimeError as error:
        raise refusal(
            "BUFFER_NOT_OPENED",
            f"The memory of vLLM's worker cannot be mapped ({str(error).splitlines()[0]}). Raise "
            "the limit on memory (ulimit -v), and start the training server again.",
        ) from None
    finally:
        os.close(descriptor)
    return Mapping(storage, buffer.size_bytes, handle.inode)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of parameters inside shared mappings of the engine's memory, and anywhere else."""

    parameters: int
    shared_bytes: int
    copied_bytes: int


def measure(parameters: list[torch.Tensor], mappings: Iterable[Mapping]) -> MemoryUse:
    """Where the parameters' bytes really lie.

    On CPU this is read from the kernel's list of mappings; on a GPU, from torch's list of the
    segments that this process allocated itself.

    Args:
        parameters: each one once.
        mappings: of the engine's buffers.
    """
    inodes = {mapping.inode for mapping in mappings if mapping.inode is not None}
    opened = [mapping.storage for mapping in mappings if mapping.inode is None]
    on_cpu = _shared_ranges(inodes) if inodes else []
    on_gpu = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in opened]
    own = own_segments() if opened else []
    shared = copied = count = 0
    for parameter in parameters:
        count += parameter.numel()
        size = parameter.numel() * parameter.element_size()
        ranges = on_gpu if parameter.is_cuda else on_cpu
        if _inside(parameter, ranges) and not (parameter.is_cuda and _inside(parameter, own)):
            shared += size
        else:
            copied += size
    return MemoryUse(count, shared, copied)


def _inside(tensor: torch.Tensor, ranges: Ranges) -> bool:
    return any(low <= tensor.data_ptr() < high for low, high in ranges)


def _shared_ranges(inodes: set[int]) -> Ranges:
    """Address ranges of shared mappings of the given files (proc(5), /proc/pid/maps)."""
    ranges = []
    for line in MAPS.read_text().splitlines():
        addresses, modes, _, _, inode = line.split(maxsplit=5)[:5]
        if modes[3] == "s" and int(inode) in inodes:
            low, high = addresses.split("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges
