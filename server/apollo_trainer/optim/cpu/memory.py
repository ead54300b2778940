"""Tensors as memory of bit patterns, as `loops.py` takes it, and scratch memory for each thread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from threading import local
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Tile = tuple[int, slice]  # a matrix of a stack, and what is taken of its first side
Rows = tuple[Array, int, int]  # memory, the place of the first element, the distance of rows

BITS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float32: (torch.int32, np.uint32),
    # A number and no pattern: what the loops see of it is float32, which holds each of them.
    torch.float16: (torch.float16, np.float16),
}
TILE = 2**18  # elements that are projected at once: 1 MiB as float32
CHUNK = 2**18  # elements that are written at once
PADDING = 16  # of a tile's rows: rows that are a power of two apart share a place in the caches
_threads = local()


def scratch(name: str, size: int, dtype: Any) -> Array:
    """Memory of this thread for the task at hand: fresh memory costs more than the work on it."""
    kept: Array | None = getattr(_threads, name, None)
    if kept is None or kept.nbytes < size * np.dtype(dtype).itemsize:
        kept = np.empty(size, dtype).view(np.uint8)
        setattr(_threads, name, kept)
    return kept[: size * np.dtype(dtype).itemsize].view(dtype)


@dataclass(frozen=True)
class Memory:
    """The bit patterns of a stack [E, a, b], and the memory from its first to its last element.

    float16 is in it as itself.
    """

    view: Array
    flat: Array

    @staticmethod
    def of(t: Tensor) -> Memory:
        """Of a tensor [a, b] or [E, a, b] of any strides, which it shares the memory with."""
        bits, unsigned = BITS[t.dtype]
        stack = t.detach().view(bits)
        stack = stack if stack.ndim == 3 else stack.unsqueeze(0)
        span = 1 + sum((n - 1) * s for n, s in zip(stack.shape, stack.stride(), strict=True))
        flat = stack.as_strided((span,), (1,))
        return Memory(stack.numpy().view(unsigned), flat.numpy().view(unsigned))

    @property
    def is_half(self) -> bool:
        """Whether it is float16."""
        return bool(self.view.dtype == np.float16)

    def larger_first(self) -> Memory:
        """Itself [E, n, m] with n >= m, or its transpose."""
        _, a, b = self.view.shape
        return self if a >= b else Memory(self.view.swapaxes(1, 2), self.flat)

    def steps(self) -> tuple[int, int, int]:
        """The distances of neighbours, in elements."""
        e, a, b = (s // self.view.itemsize for s in self.view.strides)
        return e, a, 1 if self.view.shape[2] == 1 else b

    def rows(self, tile: Tile) -> Rows:
        """Where rows lie; in a copy, unless the elements of a row are neighbours.

        Of float16 it is a copy as float32.
        """
        e, rows = tile
        if self.is_half:
            wide = np.empty(self.view[e, rows].shape, np.float32)
            convert(self.view[e, rows], wide)
            return wide.reshape(-1).view(np.uint32), 0, self.view.shape[2]
        by_matrix, by_row, by_column = self.steps()
        if by_column == 1:
            return self.flat, e * by_matrix + rows.start * by_row, by_row
        return np.ascontiguousarray(self.view[e, rows]).reshape(-1), 0, self.view.shape[2]

    def put_back(self, tile: Tile, rows: Rows) -> None:
        """Stores what `rows` gave, where it was a copy."""
        if rows[0] is not self.flat:
            target = self.view[tile[0], tile[1]]
            target[...] = rows[0].reshape(target.shape)

    def floats(self, tile: Tile, loops: ModuleType) -> Rows:
        """Rows as float32; a copy, unless they are float32 and the elements neighbours."""
        (e, rows), width = tile, self.view.shape[2]
        by_matrix, by_row, by_column = self.steps()
        at, count = e * by_matrix + rows.start * by_row, rows.stop - rows.start
        if by_column == 1 and self.flat.itemsize == 4:
            return self.flat.view(np.float32), at, by_row
        distance = width + PADDING
        out = scratch("tile", count * distance, np.uint32)
        if self.is_half:
            convert(self.view[e, rows], out.view(np.float32).reshape(count, -1)[:, :width])
        elif by_column == 1:
            loops.widen(self.flat, at, by_row, count, width, out, distance)
        elif by_row == 1:
            loops.widen_transposed(self.flat, at, by_column, width, count, out, distance)
        else:
            shift = np.uint32(8 * (4 - self.flat.itemsize))
            np.left_shift(self.view[e, rows], shift, out=out.reshape(count, -1)[:, :width])
        return out.view(np.float32), 0, distance


def convert(source: Array, target: Array) -> None:
    """Copies float16 as float32 or back, to the nearest; torch does it many at a time."""
    torch.from_numpy(target).copy_(torch.from_numpy(source))


def tiles(matrices: Iterable[int], length: int, size: int) -> list[Tile]:
    """Cuts `length` rows of each matrix into tiles of `size` rows, at least one."""
    size = max(1, size)
    return [
        (e, slice(start, min(length, start + size)))
        for e in matrices
        for start in range(0, length, size)
    ]
