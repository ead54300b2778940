"""Weights on an NVIDIA GPU: their storages are exported by CUDA IPC, where they are.

Nothing moves and nothing is copied: the handle names the allocation that vLLM made, and the offset
says where in it the storage begins (torch/multiprocessing/reductions.py, reduce_tensor).
"""

from __future__ import annotations

from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.live_weights import LiveWeights, group_by_storage, live_tensor


class CudaWeights(LiveWeights):
    """The storages of a module on one GPU, exported once.

    The export is kept: each call of torch's takes a reference slot and an event for good.
    """

    def __init__(self, model: torch.nn.Module):
        groups = group_by_storage(model)
        self.storages = [group[0][1].untyped_storage() for group in groups]
        self.tensors = [
            live_tensor(name, tensor, 0, number)
            for number, group in enumerate(groups)
            for name, tensor in group
        ]
        self._buffers = [_export(number, storage) for number, storage in enumerate(self.storages)]

    def buffers(self) -> list[pb.Buffer]:
        """CUDA IPC handles; the device is named by its UUID, since indices differ by process."""
        return self._buffers


def _export(number: int, storage: Any) -> pb.Buffer:
    try:
        device, handle, size, offset, counter, counter_offset, event, sync = storage._share_cuda_()
    except (RuntimeError, OSError) as error:
        raise FailedPrecondition(
            f"CUDA does not share its memory here ({str(error).splitlines()[0]}). In a container, "
            "start it with --ipc=host; no driver for Windows or its subsystem can",
            reason="SHARED_MEMORY_REFUSED",
        ) from error
    return pb.Buffer(
        buffer_id=number,
        size_bytes=size,
        cuda_ipc=pb.CudaIpcHandle(
            device_uuid=str(torch.cuda.get_device_properties(device).uuid),
            handle=handle,
            offset_bytes=offset,
            reference_counter_handle=counter,
            reference_counter_offset=counter_offset,
            event_handle=event,
            event_sync_required=sync,
        ),
    )
