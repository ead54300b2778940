"""Rows of `desc`: where a matrix lies, its state and its gradient."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from torch import Tensor

from apollo_trainer.optim.factored import Factored, Gradient
from apollo_trainer.optim.parameters import Slot, shifts_of

TOKENS = 6  # their place in what `moving_columns` returns


@dataclass
class Matrix:
    """A matrix, or a tensor that is not projected, as a row of `desc`."""

    slot: Slot
    state: dict[str, Tensor]
    index: int  # within a stack
    slot_number: int
    rows: int
    cols: int

    @property
    def n(self) -> int:
        """The larger side of the whole matrix: the number of channels that are here."""
        return self.rows if self._tall else self.cols

    @property
    def k(self) -> int:
        """The smaller side."""
        return self.cols if self._tall else self.rows

    @property
    def _tall(self) -> bool:
        return self.slot.rank is not None and self.slot.tall


def kept_columns(matrix: Matrix, alpha: float, offsets: tuple[int, ...]) -> list[int]:
    """The columns of `desc` that gradients do not change, in the order of `columns.py`."""
    slot, state = matrix.slot, matrix.state
    p, e = slot.param, matrix.index
    stacked = slot.rank is not None and p.ndim == 3

    def at(t: Tensor | None) -> int:
        if t is None:
            return 0
        skip = e * t.stride(0) if stacked else 0
        return t.data_ptr() + skip * t.element_size()

    strides = p.stride()[-2:] if slot.rank is not None else (0, 1)
    root = slot.root[-2:] if slot.rank is not None else (1, math.prod(slot.root))
    first = (slot.region.indices(0)[e] if stacked else 0) * math.prod(root)
    return [
        *(at(p), at(state["m"]), at(state["v"]), at(state.get("low"))),
        *(at(state.get("norm")), at(state["step"]), matrix.rows, matrix.cols, *strides, first),
        *(*slot.projection_key, *slot.rounding_key, *offsets),
        *(matrix.slot_number, int(stacked), slot.group, _bits(alpha)),
        *(*shifts_of(slot), *root, e),
    ]


def moving_columns(slot: Slot, grad: Gradient) -> tuple[int, ...]:
    """Bytes from a matrix to the next, and the columns from G_PTR on, but for the last."""
    if isinstance(grad, Factored):
        left, right, ends = grad.left, grad.right, grad.ends
        at_ends = 0 if ends is None else ends.data_ptr()
        return (
            *(0, left.data_ptr(), left.stride(0), 1),
            *(right.data_ptr(), right.stride(0), grad.tokens, at_ends, _width(grad)),
        )
    skip = grad.stride(0) * grad.element_size() if grad.ndim == 3 else 0
    strides = grad.stride()[-2:] if slot.rank is not None else (0, 1)
    return (skip, grad.data_ptr(), *strides, 0, 0, 0, 0, 0)


def _width(grad: Factored) -> int:
    """Columns of C: one a token, and those that let each expert begin at a multiple of 16."""
    experts = 1 if grad.ends is None else len(grad.ends)
    return 16 * (-(-grad.tokens // 16) + experts - 1)


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
