"""The second read of a gradient on a CPU: the weights are written."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from apollo_trainer.optim.cpu.memory import Array, Memory, Rows, Tile, convert, scratch
from apollo_trainer.optim.reference import Job

TileChange = tuple[float, int]  # the sum of squares, and how many elements
# Bit patterns, as float32, of the largest finite number of each kind of weights; float32's any.
_LARGEST = {
    np.uint32: np.uint32(0x7FFFFFFF),
    np.uint16: np.uint32(0x7F7F0000),
    np.float16: np.uint32(0x477FE000),
}


class Writer:
    """Writes weights, and knows what the loops are told about a step, in their own types."""

    def __init__(self, job: Job, loops: ModuleType) -> None:
        s, low = job.settings, job.state.get("low")
        betas = (s.betas[0], 1.0 - s.betas[0], s.betas[1], 1.0 - s.betas[1])
        self.moments = tuple(np.float32(x) for x in betas)
        self.eps, self._decay = np.float32(s.eps), np.float32(1.0 - s.lr * s.weight_decay)
        self._low = None if low is None else low.numpy().reshape(-1)
        self._job, self._loops = job, loops

    def write(
        self,
        W: Memory,
        tile: Tile,
        G: Rows,
        by_row: Array,
        by_column: Array,
        first: int = 0,
    ) -> TileChange | None:
        """Writes W - G diag(s) - lr lambda W; by_row times by_column hold lr alpha s.

        `first` is the number of the first element of W in the parameter. Returns the sum of squares
        of the change and how many elements changed, where measured.
        """
        (e, rows), (_, a, b), loops = tile, W.view.shape, self._loops
        size, first = rows.stop - rows.start, first + (e * a + rows.start) * b
        target, exact = W.rows(tile), scratch("exact", size * b, np.uint32)
        before = self._before(W, tile, target) if self._job.change is not None else None
        source, largest = target, _LARGEST[W.view.dtype.type]
        if self._low is not None:
            low = self._low[first : first + size * b]
            joined = scratch("joined", size * b, np.uint32)
            loops.join(*target, size, b, low, joined)
            source = (joined, 0, b)
        loops.subtract(*source, *G, size, b, by_row, by_column, self._decay, largest, exact)
        if W.flat.itemsize == 4:
            W.view[e, rows] = exact.reshape(size, b)
        elif W.is_half:
            self._round_float16(exact, first)
            convert(exact.view(np.float32).reshape(size, b), W.view[e, rows])
        else:
            added, tie = self._added(first, size * b)
            loops.store_bfloat16(exact, added, tie, *target, size, b)
            W.put_back(tile, target)
        if self._low is not None:
            # The lower half comes first in memory.
            low[:] = exact.view(np.int16)[::2]
        return None if before is None else loops.changes(before, *W.rows(tile), size, b)

    def _before(self, W: Memory, tile: Tile, target: Rows) -> Array:
        """The weights as `changes` compares them."""
        return target[0] if W.is_half else np.array(W.view[tile]).reshape(-1)

    def _round_float16(self, exact: Array, first: int) -> None:
        """In place, to numbers of float16; to the nearest ones conversion itself rounds."""
        if self._job.rounding.mode == "stochastic":
            self._loops.round_float16(exact, self._added(first, exact.size)[0])

    def _added(self, first: int, count: int) -> tuple[Array, np.uint32]:
        """What rounding adds to `count` bit patterns before it cuts their lower halves off."""
        rounding = self._job.rounding
        if rounding.mode == "stochastic":
            skip = first % 8
            words = scratch("words", (skip + count + 7) // 8 * 4, np.uint32)
            self._loops.draw_words(words, first // 8, rounding.step, *rounding.key)
            return words.view(np.uint16)[skip:], np.uint32(0)
        tie = rounding.mode == "nearest"
        return np.full(count, 0x7FFF if tie else 0x8000, np.uint16), np.uint32(tie)
