"""Algorithm 1 of arXiv 2412.05270 on a CPU, for matrices and stacks of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apollo_trainer.optim.cpu.memory import CHUNK, TILE, Array, Memory, Tile, scratch, tiles
from apollo_trainer.optim.cpu.product import Product
from apollo_trainer.optim.cpu.threads import Stepping, Task
from apollo_trainer.optim.cpu.writing import Writer
from apollo_trainer.optim.factored import Factored, Projection
from apollo_trainer.optim.projection import normal_quantiles
from apollo_trainer.optim.reference import Job, bias_corrections, limit, rate


def step_matrices(job: Job, loops: ModuleType) -> Stepping:
    """Algorithm 1 for a matrix [a, b], or for each matrix of a stack [E, a, b]."""
    state, writer = job.state, Writer(job, loops)
    G = Product(job.grad) if isinstance(job.grad, Factored) else Memory.of(job.grad)
    projected = _Projected(job, writer, loops)
    yield projected.tasks(G)
    step = state["step"].view(-1) + 1
    s, G_norms = projected.scaling_factors(), torch.from_numpy(projected.norms)
    X_norm: Tensor = torch.linalg.vector_norm(s * G_norms, dim=-1)
    finite = X_norm.isfinite()
    # An expert that no token reached has no gradient at all: it keeps its weights and moments.
    active = finite & (G_norms > 0).any(-1) if job.grad.ndim == 3 else finite
    factor, norm = limit(job, X_norm, step)
    for key, new in (("step", step), ("norm", norm)):
        np.copyto(state[key].view(-1).numpy(), new.numpy(), where=active.numpy())
    factors = (s * (factor * rate(job, step)).unsqueeze(-1)).expand(G_norms.shape).contiguous()
    W = Memory.of(job.slot.param)
    write = partial(_write, G, W, factors.numpy(), writer)
    matrices = active.nonzero().flatten().tolist()
    a, b = job.grad.shape[-2:]
    found = yield [
        *(partial(projected.take_moments, tile) for tile in projected.chunks(matrices)),
        *(partial(write, tile) for tile in tiles(matrices, a, CHUNK // b)),
    ]
    return bool(finite.all()), [each for each in found if each is not None]


class _Projected:
    """R = P G [E, r, n] of a gradient [E, n, m], and what follows from it and the moments.

    The tiles of G are copied as rows of channels whatever their strides: the product sums the
    same numbers in the same order for a matrix and for its transpose.
    """

    def __init__(self, job: Job, writer: Writer, loops: ModuleType) -> None:
        self._job, self._writer, self._loops = job, writer, loops
        m, n = sorted(job.grad.shape[-2:])
        count, rank = math.prod(job.grad.shape[:-2]), job.slot.rank or 0
        P = np.empty(rank * m, np.float32)
        key, window = job.slot.projection_key, job.settings.window
        words = scratch("words", (P.size + 7) // 8 * 4, np.uint32)
        scale = np.float32(1.0 / math.sqrt(rank))
        loops.draw_words(words, 0, window, *key)
        loops.look_up(_quantiles(), words.view(np.uint16), scale, P)
        self._P = P.reshape(rank, m)
        self._R = np.empty((count, rank, n), np.float32)
        self._m, self._v = (job.state[key].numpy().reshape(count, -1) for key in "mv")
        step = job.state["step"].view(-1) + 1
        self._corrections = [c.numpy() for c in bias_corrections(job, step)]
        self.norms = np.empty((count, n), np.float32)
        self._sums = np.empty((2, count, n), np.float32)

    def tasks(self, G: Memory | Product) -> list[Task]:
        """What fills R, the channel norms of G, and the sums that the factors are made of."""
        count, _, n = self._R.shape
        project = (
            partial(self._project_factors, G.projections(torch.from_numpy(self._P)))
            if isinstance(G, Product)
            else partial(self._project, G.larger_first())
        )
        return [partial(project, t) for t in tiles(range(count), n, TILE // self._P.shape[1])]

    def _project(self, G: Memory, tile: Tile) -> None:
        (e, rows), (X, at, distance) = tile, G.floats(tile, self._loops)
        size, m, R = rows.stop - rows.start, self._P.shape[1], self._R[e]
        self._loops.row_norms(X, at, distance, size, m, self.norms[e, rows])
        tall = torch.from_numpy(X).as_strided((size, m), (distance, 1), at)
        torch.mm(torch.from_numpy(self._P), tall.mT, out=torch.from_numpy(R[:, rows]))
        self._sum_channels(tile)

    def _project_factors(self, projections: Sequence[Projection], tile: Tile) -> None:
        e, rows = tile
        R, norms = torch.from_numpy(self._R[e]), torch.from_numpy(self.norms[e, rows])
        projections[e].project(rows, R, norms)
        self._sum_channels(tile)

    def _sum_channels(self, tile: Tile) -> None:
        (e, rows), R, rank = tile, self._R[tile[0]], len(self._P)
        self._loops.channel_sums(
            R.reshape(-1), self._m[e], self._v[e], rank, R.shape[1], rows.start,
            *self._writer.moments, *(c[e] for c in self._corrections), self._writer.eps,
            *self._sums[:, e, rows],
        )  # fmt: skip

    def scaling_factors(self) -> Tensor:
        """s [E, n] for variant 'channel', [E, 1] for 'mini': |R~| / |R|, and 0 where R is 0."""
        squares = torch.from_numpy(self._sums)
        if self._job.settings.variant == "mini":
            squares = squares.sum(-1, keepdim=True)
        scaled, plain = squares.sqrt()
        return torch.where(plain == 0, 0.0, scaled / plain)

    def chunks(self, matrices: Iterable[int]) -> list[Tile]:
        """Pieces of the moments of some matrices."""
        return tiles(matrices, self._m.shape[1], CHUNK)

    def take_moments(self, tile: Tile) -> None:
        """Takes R into a piece of both moments."""
        R, m, v = (X.reshape(len(self._m), -1)[tile] for X in (self._R, self._m, self._v))
        self._loops.take_moments(R, m, v, *self._writer.moments)


@lru_cache(maxsize=1)
def _quantiles() -> Array:
    quantiles: Array = normal_quantiles(torch.device("cpu")).to(torch.float32).numpy()
    return quantiles


def _write(G: Memory | Product, W: Memory, factors: Array, writer: Writer, tile: Tile) -> Any:
    """Writes some rows of W; `factors` [E, n] hold lr alpha s."""
    (e, rows), (_, a, b) = tile, W.view.shape
    ones = np.ones(b if a >= b else rows.stop - rows.start, np.float32)
    by_row, by_column = (factors[e, rows], ones) if a >= b else (ones, factors[e])
    return writer.write(W, tile, G.rows(tile), by_row, by_column)
