"""A part of a GPU's multiprocessors, on which steps run while vLLM decodes on the others.

It is a green context (NVIDIA, "CUDA Driver API", Green Contexts; torch.cuda.green_contexts): the
kernels of its streams, and those captured there, run on its multiprocessors wherever they are
launched from. Two processes run at a time under MPS alone, so that elsewhere nothing is divided.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger(__name__)


class DevicePart:
    """A part of one GPU.

    Args:
        percent: of its multiprocessors; a GPU divides them by eights, and rounds up.

    Attributes:
        percent: as given.
        entered: whether steps run on it now; training thread.

    Raises RuntimeError where the GPU, its driver or torch has no such parts.
    """

    def __init__(self, device: torch.device, percent: int):
        from torch.cuda import green_contexts

        self.percent, self.entered = percent, False
        self._outer: Any = None
        have = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, have * percent // 100)
        green: Any = green_contexts.GreenContext
        # Kept: its streams end with it.
        self._context = green.create(num_sms=wanted, device_id=device.index or 0)
        self.stream = self._context.Stream()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is launched within it runs on this part, after what was launched before it."""
        self._outer = torch.cuda.current_stream()
        self.stream.wait_stream(self._outer)
        self.entered = True
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self.leave()

    def leave(self) -> None:
        """What is launched from here on runs on all, within `running` too."""
        if self.entered:
            self.entered = False
            self._outer.wait_stream(self.stream)
            torch.cuda.set_stream(self._outer)


def part_of(
    device: torch.device, percent: int, environment: Mapping[str, str] = os.environ
) -> DevicePart | None:
    """The part of this process; None where all of the GPU is asked for, or nothing is divided."""
    if percent == 100 or not environment.get("CUDA_MPS_PIPE_DIRECTORY"):
        return None
    try:
        return DevicePart(device, percent)
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        log.warning("Training may use all of the GPU while vLLM decodes: %s", error)
        return None
