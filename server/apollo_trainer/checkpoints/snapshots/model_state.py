"""Weights and Apollo state together, in host memory: what snapshots, undo and restore exchange."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.checkpoints.disk import digest
from apollo_trainer.checkpoints.host_memory import Memory
from apollo_trainer.optim import Apollo
from apollo_trainer.optim.named_state import tensor_name


@dataclass
class ModelState:
    """A model between two steps.

    Attributes:
        parameters: by name; contiguous CPU tensors.
        moments: the tensors of `Apollo.named_state`; contiguous CPU tensors.
        description: its metadata; what JSON can hold.
        extra: what the owner keeps beside them, such as the place in its data; likewise.
        digests: of the parameters, where they are known.
    """

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    description: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def digest(self, name: str) -> str:
        """Of one parameter; computed once."""
        if name not in self.digests:
            self.digests[name] = digest(self.parameters[name])
        return self.digests[name]

    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (*self.parameters.values(), *self.moments.values()))


def _ordinary(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def to_host(tensor: Tensor, memory: Memory = _ordinary) -> Tensor:
    """A contiguous copy in host memory; waits for the device."""
    return memory(tensor).copy_(tensor.detach())


def moments_of(optimizer: Apollo, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The live state tensors of one parameter by their flat names; none where it has no state."""
    state = optimizer.state.get(parameter, {})
    return {tensor_name(part, name): tensor for part, tensor in state.items()}


def capture(parameters: Mapping[str, Tensor], optimizer: Apollo) -> ModelState:
    """A copy of all. Raises RuntimeError in the middle of a step."""
    moments, description = optimizer.named_state()
    return ModelState(
        {name: to_host(p) for name, p in parameters.items()},
        {name: to_host(t) for name, t in moments.items()},
        copy.deepcopy(description),
    )
