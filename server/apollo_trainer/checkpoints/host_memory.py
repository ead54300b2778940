"""Host memory for tensors: fresh memory that is cheap to touch, and memory that is used again.

The first write to a page costs several times what the copy does. Measured on a virtual machine:
into memory that was written before, 19 GB/s; into fresh memory, 3; into fresh huge pages, 10, but
0.5 where the machine had given them back to its host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod

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
