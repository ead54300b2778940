"""Host memory for tensors: buffers that are used again, and copies that a device makes into them.

The first write to a page costs several times what the copy does. Measured on a virtual machine:
into memory that was written before, 19 GB/s; into fresh memory, 3; into fresh huge pages, 10, but
0.5 where the machine had given them back to its host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Allocates a contiguous CPU tensor of a tensor's shape and dtype, not initialised.
Memory = Callable[[Tensor], Tensor]


def empty_like_host(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor of this shape and dtype, not initialised.

    numpy asks the kernel for huge pages for arrays of 4 MiB or more; torch does not. Not for a
    training step: huge pages can be slow to come.
    """
    array = np.empty(tuple(tensor.shape), f"i{tensor.itemsize}")
    return torch.from_numpy(array).view(tensor.dtype)


class HostBuffers:
    """A pool of buffers; only `clear` and `keep_only` free them. Any thread.

    Args:
        pinned: pin all of them. Buffers for tensors of a CUDA device always are, so that the device
            copies while it computes.
        keeps: keep what is given back; otherwise it is freed, and each buffer is fresh memory.
    """

    def __init__(self, pinned: bool = False, *, keeps: bool = True) -> None:
        self._pinned, self._keeps = pinned, keeps
        self._free: dict[tuple[torch.Size, torch.dtype, bool], list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, like: Tensor) -> Tensor:
        """A contiguous CPU tensor of this shape and dtype, not initialised."""
        pinned = self._pinned or like.is_cuda
        with self._lock:
            if free := self._free.get((like.shape, like.dtype, pinned)):
                return free.pop()
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)

    def give(self, *buffers: Tensor) -> None:
        """Returns buffers to the pool; nothing may use them any more."""
        if not self._keeps:
            return
        with self._lock:
            for buffer in buffers:
                key = (buffer.shape, buffer.dtype, buffer.is_pinned())
                self._free.setdefault(key, []).append(buffer)

    def keep_only(self, *buffers: Tensor) -> None:
        """Frees the pool, then returns these buffers to it: it never holds more than one copy."""
        self.clear()
        self.give(*buffers)

    def clear(self) -> None:
        """Frees the buffers in the pool; those that are taken stay."""
        with self._lock:
            self._free.clear()


class Staging:
    """One block of pinned memory, as large as the largest tensor so far.

    Live tensors of a device pass through it on their way to the disk.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, contiguous; waits for the device.

        A copy of a device's tensor is overwritten by the next call. A CPU tensor is not copied.
        """
        if tensor.device.type == "cpu":
            return tensor.contiguous()
        if self._block.numel() < tensor.nbytes:
            self._block = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        host = self._block[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return host.copy_(tensor)


class DeviceEvent:
    """A CUDA event, recorded in the current stream; for a CPU there is nothing to wait for."""

    def __init__(self, on_device: bool):
        self._event: Any = None
        if on_device:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Returns when the device has reached the event."""
        if self._event is not None:
            self._event.synchronize()

    @contextmanager
    def in_stream_after(self, device: torch.device) -> Iterator[None]:
        """In the block, a new stream is current, whose work begins after the event."""
        if self._event is None:
            yield
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            yield


class StagingCopy:
    """Values in host memory, or on their way there.

    Args:
        on_device: a CUDA device writes them, by work that is in the current stream now.
    """

    def __init__(self, values: Tensor, *, on_device: bool = False):
        self._values, self._copied = values, DeviceEvent(on_device)

    @classmethod
    def of(cls, tensor: Tensor, buffers: HostBuffers) -> StagingCopy:
        """Copies a tensor into a buffer; does not wait for a CUDA device.

        What is put into the current stream afterwards may write the tensor.
        """
        tensor = tensor.detach()
        buffer = buffers.take(tensor).copy_(tensor, non_blocking=tensor.is_cuda)
        return cls(buffer, on_device=tensor.is_cuda)

    def tensor(self) -> Tensor:
        """The values; waits until the device has written them."""
        self._copied.wait()
        return self._values
