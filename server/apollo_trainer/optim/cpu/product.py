"""A gradient on a CPU of which only the factors exist; its tiles are made one at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apollo_trainer.optim.cpu.memory import Rows, Tile, scratch
from apollo_trainer.optim.factored import Factored, Projection


class Product:
    """G [E, a, b], made tile by tile from its factors. `Memory` is its like for a whole one."""

    def __init__(self, grad: Factored) -> None:
        self._matrices = list(grad.matrices())
        self._tall = grad.shape[-2] >= grad.shape[-1]

    def projections(self, P: Tensor) -> list[Projection]:
        """The projection of each matrix by P, float32 [r, m]."""
        return [Projection(factors, P, self._tall) for factors in self._matrices]

    def rows(self, tile: Tile) -> Rows:
        """Some rows as bit patterns of float32, in memory of this thread."""
        (left, right), rows = self._matrices[tile[0]], tile[1]
        height, width = rows.stop - rows.start, right.shape[1]
        product = scratch("product", height * width, np.float32)
        out = torch.from_numpy(product).view(height, width)
        torch.mm(left[:, rows].mT, right, out=out)
        return product.view(np.uint32), 0, width
