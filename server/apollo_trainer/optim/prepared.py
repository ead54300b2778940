"""What a step is prepared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apollo_trainer.optim import cuda
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.parameters import Slot

Path = Literal["reference", "cpu", "cuda"]


@dataclass
class PreparedStep:
    """What is known of a step's parameters, and set aside for them, before it is begun.

    Attributes:
        gradients: that it is prepared for; None for the tensors' own.
        works: the parameters with a gradient, and by which path each is stepped.
        on_cuda: what the kernels of each device work with.
    """

    gradients: Mapping[Tensor, Gradient] | None
    works: list[tuple[Slot, Gradient, Path]]
    on_cuda: dict[torch.device, cuda.Prepared]
