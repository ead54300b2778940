"""Host memory that live tensors of a device pass through on their way to the disk."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """One block of pinned memory, as large as the largest tensor so far.

    Fresh pageable memory for each tensor costs several times what the copy does.
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
