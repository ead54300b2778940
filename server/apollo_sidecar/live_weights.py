"""The live weights of one worker: their memory, and the manifest that describes it.

On CPU every parameter and buffer of the loaded module is moved into one memfd, so that another
process can map the bytes that vLLM computes with. The module's Parameter objects stay; only what
they point to moves, once, before profiling and compilation bake addresses in.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import Any

import torch

from apollo_grpc.errors import Unimplemented
from apollo_grpc.v1 import weight_export_pb2 as pb

# A cache line and more; every dtype's alignment divides it.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class LiveTensor:
    """A tensor of vLLM's module within the shared buffer; offset in bytes, stride in elements."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset_bytes: int

    @property
    def end_bytes(self) -> int:
        """One past the last byte that any element of the tensor occupies."""
        span = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        return self.offset_bytes + span * self.dtype.itemsize


class LiveWeights:
    """One memfd with every parameter and buffer of a module, and where each one lies in it.

    Attributes:
        storage: the mapped buffer; every tensor of the module is a view of it.
        tensors: one entry a name, tied names included.
    """

    def __init__(self, model: torch.nn.Module):
        groups = _group_by_storage(model)
        offsets, size = _lay_out(groups)
        self._fd = _sealed_memfd(size)
        self.size_bytes = size
        self.storage: Any = torch.UntypedStorage.from_file(
            f"/proc/self/fd/{self._fd}", shared=True, nbytes=size
        )
        self.tensors = [
            entry
            for offset, group in zip(offsets, groups, strict=True)
            for entry in self._move(offset, group)
        ]

    def _move(self, offset: int, group: list[tuple[str, torch.Tensor]]) -> list[LiveTensor]:
        """Copies one old storage into the buffer and points its tensors there."""
        old = group[0][1].untyped_storage()
        _bytes(self.storage, offset, old.nbytes()).copy_(_bytes(old, 0, old.nbytes()))
        # All entries first: a tied parameter is listed by each of its names, and once it has
        # moved, its offset is no longer that of the old storage.
        entries = [_entry(name, tensor, offset) for name, tensor in group]
        for entry, (_, tensor) in zip(entries, group, strict=True):
            tensor.data = self.view(entry)
        return entries

    def view(self, entry: LiveTensor) -> torch.Tensor:
        """The live tensor itself, of the entry's shape and dtype."""
        offset = entry.offset_bytes // entry.dtype.itemsize
        empty = torch.empty(0, dtype=entry.dtype)
        return empty.set_(self.storage, offset, entry.shape, entry.stride)

    def manifest(self) -> pb.WeightManifest:
        """What another process needs to map the weights; the epoch is filled in by the engine."""
        manifest = pb.WeightManifest(generation=1, worker_pid=os.getpid(), tensor_parallel_size=1)
        manifest.buffers.add(
            buffer_id=0,
            size_bytes=self.size_bytes,
            memfd=pb.MemfdHandle(pid=os.getpid(), fd=self._fd, inode=os.fstat(self._fd).st_ino),
        )
        groups: dict[tuple[int, int], int] = {}
        for entry in self.tensors:
            region = (entry.offset_bytes, entry.end_bytes)
            manifest.tensors.add(
                name=entry.name,
                dtype=str(entry.dtype).removeprefix("torch."),
                shape=entry.shape,
                stride=entry.stride,
                buffer_id=0,
                offset_bytes=entry.offset_bytes,
                alias_group=groups.setdefault(region, len(groups)),
            )
        return manifest


def _entry(name: str, tensor: torch.Tensor, storage_offset_bytes: int) -> LiveTensor:
    start = storage_offset_bytes + int(tensor.storage_offset()) * tensor.element_size()
    return LiveTensor(name, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), start)


def _bytes(storage: torch.UntypedStorage, offset: int, size: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, offset, (size,), (1,))


def require_cpu(model: torch.nn.Module) -> None:
    """Raises Unimplemented where weights lie on a device that this version cannot export."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise Unimplemented(
                f"The weight {name} lies on {parameter.device}; this version exports CPU weights "
                "only. Serve with the CPU build of vLLM."
            )


def _group_by_storage(model: torch.nn.Module) -> list[list[tuple[str, torch.Tensor]]]:
    """Named parameters and buffers, those of one storage together; without empty and meta ones."""
    groups: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            storage = tensor.untyped_storage()
            if storage.nbytes() and not tensor.is_meta:
                groups.setdefault(storage._cdata, []).append((name, tensor))
    return list(groups.values())


def _lay_out(groups: list[list[tuple[str, torch.Tensor]]]) -> tuple[list[int], int]:
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
    """
    fd = os.memfd_create("apollo-live-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
