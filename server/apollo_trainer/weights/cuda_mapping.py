"""Opens memory of another process on the same GPU by CUDA IPC.

Indices of devices differ between processes (CUDA_VISIBLE_DEVICES); UUIDs do not.
"""

from __future__ import annotations

from typing import Any

import torch

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb


def device_index(uuid: str) -> int | None:
    """This process's index of a GPU; None where it does not see that one."""
    for index in range(torch.cuda.device_count()):
        if _bare(str(torch.cuda.get_device_properties(index).uuid)) == _bare(uuid):
            return index
    return None


def _bare(uuid: str) -> str:
    """nvidia-smi writes the prefix, torch does not."""
    return uuid.removeprefix("GPU-").lower()


def open_ipc_handle(buffer: pb.Buffer, device: int) -> Any:
    """The storage of another process, as torch.multiprocessing opens it (rebuild_cuda_tensor).

    Raises RuntimeError where CUDA refuses the handle, as when its owner has ended.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    handle = buffer.cuda_ipc
    storage: Any = torch.UntypedStorage
    return storage._new_shared_cuda(
        device,
        handle.handle,
        buffer.size_bytes,
        handle.offset_bytes,
        handle.reference_counter_handle,
        handle.reference_counter_offset,
        handle.event_handle,
        handle.event_sync_required,
    )


def own_segments() -> list[tuple[int, int]]:
    """Address ranges that this process's torch allocated; what it opened by IPC is not there."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return [(s["address"], s["address"] + s["total_size"]) for s in segments]
