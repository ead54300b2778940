"""Weights and Apollo state of one moment, in host memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.checkpoints.disk import digest
from apollo_trainer.optim import Apollo
from apollo_trainer.optim.named_state import tensor_name
from apollo_trainer.weights.checkpoint_reader import CheckpointReader


@dataclass
class ModelState:
    """A model between two steps.

    Attributes:
        parameters: by name; contiguous CPU tensors.
        moments: the tensors of `Apollo.named_state`; contiguous CPU tensors.
        description: the metadata of `Apollo.named_state`; what JSON can hold.
        extra: what the caller keeps beside them; what JSON can hold.
        digests: of the parameters, where they are known.
    """

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    description: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def digest(self, name: str) -> str:
        """The digest of one parameter; computed once."""
        if name not in self.digests:
            self.digests[name] = digest(self.parameters[name])
        return self.digests[name]


def of_all_ranks(reader: CheckpointReader, optimizer: Apollo, extra: dict[str, Any]) -> ModelState:
    """The model of ranks that each have a part, copied before this returns."""
    moments, description = optimizer.named_state()
    return ModelState(
        {name: to_host(reader.whole(name)) for name in reader.roots()},
        {name: to_host(tensor) for name, tensor in moments.items()},
        copy.deepcopy(description),
        copy.deepcopy(extra),
    )


def to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in ordinary host memory; waits for the device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def moments_of(optimizer: Apollo, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The live state tensors of one parameter by their flat names; none where it has no state."""
    state = optimizer.state.get(parameter, {})
    return {tensor_name(part, name): tensor for part, tensor in state.items()}
