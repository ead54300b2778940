"""Copies in host memory that a CUDA device makes beside the host, in the order of its stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from apollo_trainer.checkpoints.host_memory import HostBuffers


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
