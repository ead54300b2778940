"""Opens memory of another process on the same GPU by CUDA IPC.

Indices of devices differ between processes (CUDA_VISIBLE_DEVICES); UUIDs do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.manifest import refusal


def device_of(buffers: Iterable[pb.Buffer]) -> int | None:
    """This process's index of the one GPU that buffers lie on; None for a CPU's.

    Raises FailedPrecondition where this process does not see that GPU.
    """
    uuid = next((b.cuda_ipc.device_uuid for b in buffers if b.HasField("cuda_ipc")), None)
    if uuid is None:
        return None
    for index in range(torch.cuda.device_count()):
        if _bare(str(torch.cuda.get_device_properties(index).uuid)) == _bare(uuid):
            return index
    raise refusal(
        "DEVICE_NOT_VISIBLE",
        f"vLLM's weights lie on the GPU {uuid}, which this process does not see. Start the "
        "training server with CUDA_VISIBLE_DEVICES set to it.",
    )


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
