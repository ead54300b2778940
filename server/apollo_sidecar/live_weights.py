"""The live weights of one worker: where each tensor lies, and the manifest that describes it.

Two rooms share the memory with other processes, each in its device's way: `memfd_weights` on CPU,
`cuda_weights` on NVIDIA GPUs. What both know about a tensor is here.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from apollo_grpc import process_state
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.region import reach
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.generation import GenerationPage

Group = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class LiveTensor:
    """A tensor of vLLM's module within a shared buffer; offset in bytes, stride in elements."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset_bytes: int
    buffer_id: int = 0

    @property
    def end_bytes(self) -> int:
        """One past the last byte that any element of the tensor occupies."""
        return self.offset_bytes + reach(self.shape, self.stride) * self.dtype.itemsize


class LiveWeights(ABC):
    """A module's parameters and buffers in memory that another process can map.

    Attributes:
        storages: the shared buffers; a buffer's id is its place here.
        tensors: one entry a name, tied names included.
    """

    storages: list[torch.UntypedStorage]
    tensors: list[LiveTensor]

    @abstractmethod
    def buffers(self) -> list[pb.Buffer]:
        """The handles of `storages`, in their order."""

    @cached_property
    def generation(self) -> GenerationPage:
        """How often somebody else than a training server changed these weights."""
        return GenerationPage()

    @property
    def size_bytes(self) -> int:
        """Of all buffers."""
        return sum(storage.nbytes() for storage in self.storages)

    def buffer_id(self, storage: int) -> int:
        """The buffer of a storage, known by its `_cdata`. Raises KeyError for one not shared."""
        return {s._cdata: number for number, s in enumerate(self.storages)}[storage]

    def manifest(self) -> pb.WeightManifest:
        """What another process needs to map the weights; the epoch is filled in by the engine."""
        manifest = pb.WeightManifest(
            generation=self.generation.now,
            generation_page=self.generation.handle(),
            worker_pid=os.getpid(),
            worker_pid_namespace=process_state.namespace(),
            tensor_parallel_size=1,
        )
        manifest.buffers.extend(self.buffers())
        groups = alias_groups(self.tensors)
        for entry in self.tensors:
            manifest.tensors.add(
                name=entry.name,
                dtype=str(entry.dtype).removeprefix("torch."),
                shape=entry.shape,
                stride=entry.stride,
                buffer_id=entry.buffer_id,
                offset_bytes=entry.offset_bytes,
                alias_group=groups[entry.name],
            )
        return manifest

    def require_unmoved(self, model: torch.nn.Module) -> None:
        """Raises FailedPrecondition when the module no longer computes with the shared memory.

        Whoever maps the old place would train memory that nobody reads.
        """
        shared = {entry.name: entry for entry in self.tensors}
        for group in group_by_storage(model):
            for name, tensor in group:
                entry = shared.get(name)
                if entry is None or tensor.data_ptr() != self._address(entry):
                    raise FailedPrecondition(
                        f"vLLM moved the weight {name} after it was shared; restart vLLM to share "
                        "its weights anew.",
                        reason="WEIGHTS_MOVED",
                    )

    def _address(self, entry: LiveTensor) -> int:
        return int(self.storages[entry.buffer_id].data_ptr()) + entry.offset_bytes


def group_by_storage(model: torch.nn.Module) -> list[Group]:
    """Named parameters and buffers, those of one storage together; without empty and meta ones."""
    groups: dict[int, Group] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            storage: Any = tensor.untyped_storage()
            if storage.nbytes() and not tensor.is_meta:
                groups.setdefault(storage._cdata, []).append((name, tensor))
    return list(groups.values())


def alias_groups(tensors: list[LiveTensor]) -> dict[str, int]:
    """A number a tensor, by name; tensors that share memory have the same one."""
    groups: dict[str, int] = {}
    here, reach, group = -1, 0, -1
    for entry in sorted(tensors, key=lambda t: (t.buffer_id, t.offset_bytes)):
        if entry.buffer_id != here or entry.offset_bytes >= reach:
            here, reach, group = entry.buffer_id, 0, group + 1
        reach = max(reach, entry.end_bytes)
        groups[entry.name] = group
    return groups


def live_tensor(name: str, tensor: torch.Tensor, start_bytes: int, buffer_id: int) -> LiveTensor:
    """The entry of a tensor whose storage begins `start_bytes` into its buffer."""
    start = start_bytes + int(tensor.storage_offset()) * tensor.element_size()
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return LiveTensor(name, tensor.dtype, shape, stride, start, buffer_id)
