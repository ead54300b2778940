"""The gradients that the next step of an optimizer would take, ties summed."""

from __future__ import annotations

from torch import Tensor

from apollo_trainer.optim.apollo import Apollo


def has_ties(optimizer: Apollo) -> bool:
    """Whether a parameter is reached through two tensors, whose gradients must both be there."""
    return any(slot.aliases for slot in optimizer._slots)


def summed_gradient(optimizer: Apollo, param: Tensor) -> Tensor | None:
    """What a parameter is stepped with, of its shape; None where it has no gradient.

    Raises KeyError where the tensor is no parameter of this optimizer.
    """
    return optimizer._slot_of[param].gradient()
