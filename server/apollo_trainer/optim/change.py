"""How much one step changed the stored weights."""

from __future__ import annotations

import torch
from torch import Tensor

from apollo_trainer.parallel.ranks import Ranks

_BITS = {4: torch.int32, 2: torch.int16}


class Change:
    """Sums up the stored change of one step, on the devices of the weights."""

    def __init__(self) -> None:
        self._squares: dict[torch.device, Tensor] = {}
        self._changed: dict[torch.device, Tensor] = {}

    def add(self, before: Tensor, after: Tensor) -> None:
        """Counts one tile; both are of the stored dtype and of the same shape."""
        bits = _BITS[before.element_size()]
        changed = (before.contiguous().view(bits) != after.contiguous().view(bits)).sum()
        square = (after.to(torch.float64) - before.to(torch.float64)).square_().sum()
        self._put(self._changed, changed)
        self._put(self._squares, square)

    def add_sums(self, square: Tensor, changed: Tensor) -> None:
        """Counts what a kernel summed up: float64, 0-dim each."""
        self._put(self._changed, changed)
        self._put(self._squares, square)

    def totals(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """The Euclidean norm of the change, and how many elements changed: float64, 0-dim each."""
        together = torch.stack([self._total(self._squares), self._total(self._changed)])
        ranks.sum(together)
        return together[0].sqrt(), together[1]

    @staticmethod
    def _put(sums: dict[torch.device, Tensor], value: Tensor) -> None:
        sums[value.device] = sums[value.device] + value if value.device in sums else value

    @staticmethod
    def _total(sums: dict[torch.device, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n, value in enumerate(sums.values()):
            part = value.to(torch.float64)
            total = part if n == 0 else total + part.to(total.device, non_blocking=True)
        return total
