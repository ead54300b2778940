"""The gradients that the next step of an optimizer would take, ties summed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from apollo_trainer.optim.apollo import Apollo
from apollo_trainer.optim.factored import Gradient


def summed_gradients(
    optimizer: Apollo, given: Mapping[Tensor, Gradient] | None = None
) -> dict[Tensor, Gradient]:
    """What each parameter is stepped with; those without a gradient are not in it.

    Args:
        given: gradients by tensor, instead of the tensors' own.
    """
    found = {slot.param: slot.gradient(given) for slot in optimizer._slots}
    return {param: gradient for param, gradient in found.items() if gradient is not None}
