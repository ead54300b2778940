"""Host memory for tensors: cheap to touch, used again, and filled by a device beside the host.

The first write to a page costs several times what the copy does. Measured on a virtual machine:
into memory that was written before, 19 GB/s; into fresh memory, 3; into fresh huge pages, 10, but
0.5 where the machine had given them back to its host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# A contiguous CPU tensor of a tensor's shape and dtype, not initialised.
Memory = Callable[[Tensor], Tensor]


def empty_host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor, not initialised.

    numpy asks the kernel for huge pages where an array has 4 MiB or more; torch does not. For
    work that is waited for; a step should not bet on what they cost.
    """
    size = prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(shape)


def empty_like_host(tensor: Tensor) -> Tensor:
    """As `empty_host`, of a tensor's shape and dtype."""
    return empty_host(tuple(tensor.shape), tensor.dtype)


class HostBuffers:
    """Buffers that are taken and given back; none is freed but by `clear` and `keep_only`.

    Args:
        pinned: all of them; those for tensors of a CUDA device always are, so that copies run
            beside the host.
        keeps: what is given back; otherwise it is freed, and each one taken is fresh memory.
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
        """Back, for whoever takes the next ones; nothing may read them any more."""
        if not self._keeps:
            return
        with self._lock:
            for buffer in buffers:
                key = (buffer.shape, buffer.dtype, buffer.is_pinned())
                self._free.setdefault(key, []).append(buffer)

    def keep_only(self, *buffers: Tensor) -> None:
        """The same for all of one copy; what was kept before and nobody has taken is freed.

        No more is kept than the last copy took, also where shapes have changed since.
        """
        self.clear()
        self.give(*buffers)

    def clear(self) -> None:
        """Frees those that nobody has taken."""
        with self._lock:
            self._free.clear()


class Staging:
    """One block of pinned memory, as large as the largest tensor so far.

    Live tensors of a device pass through it on their way to the disk.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, contiguous; what a device's was copied to holds until the next.

        Waits for the device. A tensor of the CPU is not copied.
        """
        if tensor.device.type == "cpu":
            return tensor.contiguous()
        if self._block.numel() < tensor.nbytes:
            self._block = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        host = self._block[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return host.copy_(tensor)


class Reached:
    """Whether a CUDA device has come as far as its current stream was when this was made."""

    def __init__(self, on_device: bool):
        self._event: Any = None
        if on_device:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Ends when it has; at once on a CPU."""
        if self._event is not None:
            self._event.synchronize()

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        """What is given to the stream from now on begins when it has."""
        if self._event is not None:
            stream.wait_event(self._event)


class Staged(Protocol):
    """Values that will be in host memory."""

    def tensor(self) -> Tensor:
        """They, once they are complete."""


@dataclass(frozen=True)
class Held:
    """Values that are in host memory, and stay there."""

    values: Tensor

    def tensor(self) -> Tensor:
        """They."""
        return self.values


@contextmanager
def beside(reached: Reached, device: torch.device) -> Iterator[None]:
    """Within it, copies of a CUDA device are made beside what it does otherwise.

    They begin when the device has come to `reached`. A CPU copies as ever.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    reached.hold_back(stream)
    with torch.cuda.stream(stream):
        yield


class StagedCopy:
    """A copy of a tensor in a buffer; a CUDA device goes on with it after this was constructed.

    What the device does next, in the stream that is current, finds the tensor read.
    """

    def __init__(self, tensor: Tensor, buffers: HostBuffers):
        tensor = tensor.detach()
        self._buffer = buffers.take(tensor).copy_(tensor, non_blocking=tensor.is_cuda)
        self._copied = Reached(tensor.is_cuda)

    def tensor(self) -> Tensor:
        """The copy, once it is complete."""
        self._copied.wait()
        return self._buffer
