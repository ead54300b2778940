"""What a step would do, found without writing to the parameters or to their state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from apollo_trainer.optim.apollo import Apollo
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.options import GROUP_OPTIONS


class Preview:
    """What the next step of an optimizer would do with some gradients.

    A copy of each parameter and of its state is stepped by an optimizer of its own, with the same
    options, name, seed and step number: the draws depend on nothing else, so that the preview is
    what the step will store. One copy exists at a time. Nothing waits for the device until a
    result is read.

    Args:
        gradients: by parameter, each of its shape; those of tied tensors summed.

    Raises ValueError for an optimizer in compat mode, whose draws depend on the other parameters,
    and KeyError where a tensor is no parameter, or tied to another that is one.
    """

    def __init__(self, optimizer: Apollo, gradients: Mapping[Tensor, Gradient]):
        if optimizer.compat is not None:
            raise ValueError(f"compat={optimizer.compat!r} has no preview.")
        self._optimizer = optimizer
        self._places = {
            param: (group, name)
            for group in optimizer.param_groups
            for param, name in zip(group["params"], group["param_names"], strict=True)
        }
        self._updates = list[Tensor]()
        self._changed, self._weights = list[Tensor](), list[Tensor]()
        for param, gradient in gradients.items():
            self._add(param, gradient)

    def update_norm(self) -> float:
        """Norm of what the step would add to the weights, as stored."""
        return math.hypot(*map(float, self._updates))

    def weight_norm(self) -> float:
        """Norm of these parameters before the step."""
        return math.hypot(*map(float, self._weights))

    def changed(self) -> int:
        """How many stored elements would have other bits."""
        return round(sum(map(float, self._changed)))

    @torch.no_grad()
    def _add(self, param: Tensor, gradient: Gradient) -> None:
        copied = param.detach().clone()
        twin = self._twin(param, copied)
        twin.step(gradients={copied: gradient})
        update_norm, fraction = twin.last_update_norm, twin.last_changed_fraction
        assert update_norm is not None and fraction is not None
        self._updates.append(update_norm)
        self._changed.append(fraction * twin.weights)
        own: Tensor = torch.linalg.vector_norm(param.detach(), dtype=torch.float64)
        region = self._optimizer.regions.get(self._places[param][1])
        counted = own if region is None or region.counted else own.zero_()
        self._weights.append(self._optimizer.ranks.norms(counted))

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
            regions=real.regions,
            ranks=real.ranks,
        )
        for key, tensor in twin.state[copied].items():
            tensor.copy_(real.state[param][key])
        twin.step_count, twin.measure = real.step_count, True
        # The path that the whole model's step takes.
        twin.weights = real.weights
        return twin
