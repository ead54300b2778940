"""What a step holds from its beginning to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from apollo_trainer.optim import cuda
from apollo_trainer.optim.change import Change
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.options import StepSettings
from apollo_trainer.optim.parameters import Slot

Path = Literal["reference", "cpu", "cuda"]


@dataclass
class OpenStep:
    """A step that was begun.

    Attributes:
        settings: of each parameter group.
        change: sums up what was written, where that is measured.
        done: names of the parameters that were stepped.
        deferred: tied parameters that wait for all their gradients, by name.
    """

    settings: list[StepSettings]
    change: Change | None
    done: set[str] = field(default_factory=set)
    deferred: dict[str, Slot] = field(default_factory=dict)


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
