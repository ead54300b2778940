"""What is known of a step's gradients and of its update before anything is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.gradients import summed_gradient
from apollo_trainer.optim.preview import Preview, Previewer


class Inspection:
    """Takes parameters in any order, each once and with its whole gradient.

    Args:
        previews: also find what the update would be: a copy of one parameter at a time.
    """

    def __init__(self, optimizer: Apollo, *, previews: bool):
        self._optimizer = optimizer
        self._previewer = Previewer(optimizer) if previews else None
        self._norms: list[Tensor] = []
        self._previews: list[Preview] = []

    @torch.no_grad()
    def add(self, param: Tensor) -> None:
        """Looks at one parameter; nothing waits for the device."""
        gradient = summed_gradient(self._optimizer, param)
        if gradient is None:
            return
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        if self._previewer:
            self._previews.append(self._previewer.of(param, gradient))

    def grad_norm(self) -> float:
        """Norm of the whole gradient; not finite where any element is not."""
        return math.hypot(*torch.stack(self._norms).tolist()) if self._norms else 0.0

    def update_norm(self) -> float:
        """Norm of what the update would add to the weights, as stored."""
        return math.hypot(*(float(p.update_norm) for p in self._previews))

    def weight_norm(self) -> float:
        """Norm of the weights that have a gradient."""
        return math.hypot(*(float(p.weight_norm) for p in self._previews))

    def changed(self) -> int:
        """How many stored elements would have other bits."""
        return round(sum(float(p.changed) for p in self._previews))
