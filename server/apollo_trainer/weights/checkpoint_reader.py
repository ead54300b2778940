"""The live weights as checkpoint tensors, by their names in the model directory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from apollo_grpc.region import Region
from apollo_trainer.parallel.parts import NO_REGIONS, gathered
from apollo_trainer.parallel.ranks import ALONE, Ranks
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan


class CheckpointReader:
    """Checkpoint tensors by name, read from the live parameters.

    Args:
        regions: of the parameters of which this rank has a part; `read` is then every rank's call.
    """

    def __init__(
        self,
        plan: CheckpointPlan,
        parameters: dict[str, torch.nn.Parameter],
        regions: Mapping[str, Region] = NO_REGIONS,
        ranks: Ranks = ALONE,
    ):
        self._plan, self._parameters = plan, parameters
        self._regions, self._ranks = regions, ranks
        self._planned = {tensor.name: tensor for tensor in plan.tensors}

    def names(self) -> list[str]:
        """All checkpoint tensors that transformers would save, tied ones once."""
        return list(self._planned)

    def read(self, name: str) -> torch.Tensor | None:
        """The live values, contiguous; None for a name that belongs to no parameter."""
        if planned := self._planned.get(name):
            return self._plan.read(planned, self.whole(planned.root))
        root = self._plan.tied.get(name)
        return self.whole(root).contiguous() if root else None

    def roots(self) -> list[str]:
        """The parameters' names, tied ones once."""
        return list(self._parameters)

    def whole(self, root: str) -> torch.Tensor:
        """A parameter with the parts of all ranks; the live one itself where this rank has all."""
        own, region = self._parameters[root].detach(), self._regions.get(root)
        if region is None or region.whole:
            return own
        self._ranks.tell("read", root=root)
        return gathered(own, region, self._ranks)

    def parameter(self, name: str) -> torch.nn.Parameter | None:
        """The live parameter whose values `read` returns, or a part of them."""
        planned = self._planned.get(name)
        root = planned.root if planned else self._plan.tied.get(name)
        return self._parameters[root] if root else None

    def tied_to(self, name: str) -> set[str]:
        """Other names of a weight that several modules share; empty for one that is not tied."""
        planned, tied = self._planned.get(name), self._plan.tied
        root = planned.root if planned else tied.get(name)
        seconds = {second for second, first in tied.items() if first == root}
        firsts = {tensor.name for tensor in self._plan.tensors if tensor.root == root}
        return (seconds | firsts) - {name} if seconds else set()

    def outline(self, name: str) -> torch.Tensor | None:
        """Shape and dtype of what `read` returns, as a tensor without values."""
        if planned := self._planned.get(name):
            dtype = self._parameters[planned.root].dtype
            return torch.empty(planned.shape, dtype=dtype, device="meta")
        root = self._plan.tied.get(name)
        if root is None:
            return None
        dtype = self._parameters[root].dtype
        return torch.empty(self._plan.roots[root], dtype=dtype, device="meta")

    def missing_from(self, names: set[str]) -> list[str]:
        """Checkpoint tensors that no file of the directory holds, under any tied name."""
        whole = {root for name, root in self._plan.tied.items() if name in names}
        return [t.name for t in self._plan.tensors if t.name not in names and t.root not in whole]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bits, not values: NaN differs from itself and zeros of both signs do not."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*flat)
