"""What is known of a step's gradients and of its update before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.preview import Preview, Previewer


class Inspection:
    """Prepares the optimizer's step, which it is then to take with the same mapping or to forget.

    Nothing waits for the device until it is read.

    Args:
        gradients: by parameter, those of tied tensors summed.
        previews: also find what the update would be: a copy of one parameter at a time.
    """

    def __init__(self, optimizer: Apollo, gradients: Mapping[Tensor, Gradient], *, previews: bool):
        self._norm = optimizer.prepare(gradients)
        previewer = Previewer(optimizer) if previews else None
        self._previews: list[Preview] = []
        if previewer:
            self._previews = [previewer.of(*each) for each in gradients.items()]

    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient, float64, 0-dim; not finite where any element is not."""
        return self._norm

    def update_norm(self) -> float:
        """Norm of what the update would add to the weights, as stored."""
        return math.hypot(*(float(p.update_norm) for p in self._previews))

    def weight_norm(self) -> float:
        """Norm of the weights that have a gradient."""
        return math.hypot(*(float(p.weight_norm) for p in self._previews))

    def changed(self) -> int:
        """How many stored elements would have other bits."""
        return round(sum(float(p.changed) for p in self._previews))
