"""Weights on CPU: every parameter and buffer of the module is moved into one memfd.

Another process maps the bytes that vLLM computes with. The module's Parameter objects stay; only
what they point to moves, once, before profiling and compilation bake addresses in.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.live_weights import (
    Group,
    LiveTensor,
    LiveWeights,
    group_by_storage,
    live_tensor,
)
from apollo_sidecar.sealed_memory import sealed_memory

# A cache line and more; every dtype's alignment divides it.
ALIGNMENT_BYTES = 256
# By the `_cdata` of their storage.
Views = dict[int, list[torch.Tensor]]


class MemfdWeights(LiveWeights):
    """One memfd with every parameter and buffer of a module."""

    def __init__(self, model: torch.nn.Module):
        groups = group_by_storage(model)
        offsets, size = _lay_out(groups)
        self._fd = sealed_memory("apollo-live-weights", size)
        shared = _mapped(self._fd, size)
        self.storages = [shared]
        views = _unregistered(model)
        self.tensors = [
            entry
            for offset, group in zip(offsets, groups, strict=True)
            for entry in self._move(offset, group, views)
        ]
        _release_freed_memory()

    def _move(self, offset: int, group: Group, views: Views) -> list[LiveTensor]:
        """Copies one old storage into the buffer and points its tensors there."""
        old = group[0][1].untyped_storage()
        _bytes(self.storages[0], offset, old.nbytes()).copy_(_bytes(old, 0, old.nbytes()))
        # All entries first: a tied parameter is listed by each of its names, and once it has
        # moved, its offset is no longer that of the old storage.
        moved = [*group, *(("", view) for view in views.get(old._cdata, ()))]
        entries = [live_tensor(name, tensor, offset, 0) for name, tensor in moved]
        for entry, (_, tensor) in zip(entries, moved, strict=True):
            tensor.data = self.view(entry)
        return entries[: len(group)]

    def view(self, entry: LiveTensor) -> torch.Tensor:
        """The live tensor itself, of the entry's shape and dtype."""
        offset = entry.offset_bytes // entry.dtype.itemsize
        empty = torch.empty(0, dtype=entry.dtype)
        return empty.set_(self.storages[0], offset, entry.shape, entry.stride)

    def buffers(self) -> list[pb.Buffer]:
        """The memfd, reached through this process's descriptor."""
        inode = os.fstat(self._fd).st_ino
        handle = pb.MemfdHandle(pid=os.getpid(), fd=self._fd, inode=inode)
        return [pb.Buffer(buffer_id=0, size_bytes=self.size_bytes, memfd=handle)]


def _mapped(descriptor: int, size: int) -> Any:
    try:
        path = f"/proc/self/fd/{descriptor}"
        return torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
    except RuntimeError as error:
        os.close(descriptor)
        raise FailedPrecondition(
            f"{size} bytes of shared memory cannot be mapped ({str(error).splitlines()[0]}); raise "
            "the limit on memory (ulimit -v, or the container's), and start vLLM again",
            reason="SHARED_MEMORY_REFUSED",
        ) from error


def _unregistered(model: torch.nn.Module) -> Views:
    """Tensors that modules keep as plain attributes, which may be views of weights.

    Left behind, they would be copies: latent attention decodes with such (vLLM 0.26).
    """
    views: Views = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                views.setdefault(value.untyped_storage()._cdata, []).append(value)
    return views


def _release_freed_memory() -> None:
    """Gives what the old storages leave to the system, where libc can (malloc_trim(3)).

    Otherwise the heap keeps the pages of matrices below 32 MB, and vLLM is as large as with two
    copies of them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _bytes(storage: torch.UntypedStorage, offset: int, size: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, offset, (size,), (1,))


def _lay_out(groups: list[Group]) -> tuple[list[int], int]:
    """The aligned offset of each group's storage, and the size of the whole, in bytes."""
    offsets, end = [], 0
    for group in groups:
        offsets.append(end)
        size = group[0][1].untyped_storage().nbytes()
        end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end
