"""Weights on CPU: every parameter and buffer of the module is moved into one memfd.

Another process maps the bytes that vLLM computes with. The module's Parameter objects stay; only
what they point to moves, once, before profiling and compilation bake addresses in.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import weight_export_pb2 as pb
from apollo_sidecar.live_weights import (
    Group,
    LiveTensor,
    LiveWeights,
    group_by_storage,
    live_tensor,
)

# A cache line and more; every dtype's alignment divides it.
ALIGNMENT_BYTES = 256
# By the `_cdata` of their storage.
Views = dict[int, list[torch.Tensor]]


class MemfdWeights(LiveWeights):
    """One memfd with every parameter and buffer of a module."""

    def __init__(self, model: torch.nn.Module):
        groups = group_by_storage(model)
        offsets, size = _lay_out(groups)
        self._fd = _sealed_memfd(size)
        path = f"/proc/self/fd/{self._fd}"
        shared: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
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


def _sealed_memfd(size: int) -> int:
    """An anonymous file of `size` bytes that no one can shrink.

    Without the seal a truncation by any holder would end both processes with SIGBUS.

    Raises FailedPrecondition when the system does not give so large a file.
    """
    fd = os.memfd_create("apollo-live-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise FailedPrecondition(
            f"{size} bytes of shared memory are not to be had ({error.strerror}); raise the limit "
            "on file sizes (ulimit -f) and start vLLM again",
            reason="SHARED_MEMORY_REFUSED",
        ) from error
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
