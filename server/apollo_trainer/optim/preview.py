"""What a step would do to a parameter, found without writing to it or to its state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apollo_trainer.optim.apollo import Apollo
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.options import GROUP_OPTIONS


@dataclass(frozen=True)
class Preview:
    """One parameter's next step; float64, 0-dim tensors on its device.

    Attributes:
        update_norm: Euclidean norm of the stored change.
        changed: how many stored elements would have other bits.
        weight_norm: of the weights before it.
    """

    update_norm: Tensor
    changed: Tensor
    weight_norm: Tensor


class Previewer:
    """Previews the next step of an optimizer, parameter by parameter.

    A copy of the parameter and of its state is stepped by an optimizer of its own, with the same
    options, name, seed and step number: the draws depend on nothing else, so that the preview is
    what the step will store. One copy exists at a time.

    Raises ValueError for an optimizer in compat mode, whose draws depend on the other parameters.
    """

    def __init__(self, optimizer: Apollo):
        if optimizer.compat is not None:
            raise ValueError(f"compat={optimizer.compat!r} has no preview.")
        self._optimizer = optimizer
        self._places = {
            param: (group, name)
            for group in optimizer.param_groups
            for param, name in zip(group["params"], group["param_names"], strict=True)
        }

    @torch.no_grad()
    def of(self, param: Tensor, gradient: Gradient) -> Preview:
        """The next step of a parameter with this gradient, of its shape.

        Raises KeyError where the tensor is no parameter, or tied to another that is one.
        """
        copied = param.detach().clone()
        twin = self._twin(param, copied)
        twin.step(gradients={copied: gradient})
        update_norm, fraction = twin.last_update_norm, twin.last_changed_fraction
        assert update_norm is not None and fraction is not None
        weight_norm: Tensor = torch.linalg.vector_norm(param.detach(), dtype=torch.float64)
        return Preview(update_norm, fraction * param.numel(), weight_norm)

    def _twin(self, param: Tensor, copied: Tensor) -> Apollo:
        """An optimizer of the copied parameter alone, in the state of the real one."""
        real = self._optimizer
        group, name = self._places[param]
        options = {option: group[option] for option in GROUP_OPTIONS}
        twin = Apollo(
            [{"params": [(name, copied)], **options}],
            variant=real.variant,
            rounding=real.rounding,
            seed=real.seed,
            impl=real.impl,
        )
        for key, tensor in twin.state[copied].items():
            tensor.copy_(real.state[param][key])
        twin.step_count, twin.measure = real.step_count, True
        # The path that the whole model's step takes.
        twin.weights = real.weights
        return twin
