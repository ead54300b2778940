"""AdamW on a CPU, for tensors that are not projected."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apollo_trainer.optim.cpu.memory import CHUNK, Memory
from apollo_trainer.optim.cpu.threads import Stepping, Task
from apollo_trainer.optim.cpu.writing import TileChange, Writer
from apollo_trainer.optim.reference import Job, bias_corrections, rate

_Piece = tuple[Tensor, Tensor, int]  # of a parameter and its gradient; the first element's number


def step_elements(job: Job, loops: ModuleType) -> Stepping:
    """Adam with decoupled decay (AdamW), for every parameter that is not projected."""
    adam = _Adam(job, loops)
    assert isinstance(job.grad, Tensor)
    pieces = list(_pieces(job.slot.param.detach(), job.grad, 0))
    norms = yield from _few([partial(adam.norm, piece) for piece in pieces])
    finite: Tensor = torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float32)).isfinite()
    if not finite:
        return False, []
    found = yield from _few([partial(adam.step, piece) for piece in pieces])
    count = job.state["step"].view(-1).numpy()
    count += 1
    return True, [each for each in found if each is not None]


def _few(tasks: list[Task]) -> Generator[list[Task], list[Any], list[Any]]:
    """A single task is not worth a thread of its own."""
    if len(tasks) == 1:
        return [tasks[0]()]
    return (yield tasks)


def _pieces(W: Tensor, G: Tensor, first: int) -> Iterator[_Piece]:
    """Cuts both into matrices [a, b]; `first` is the number of their first element."""
    if W.is_contiguous() and G.is_contiguous():
        for start in range(0, W.numel(), CHUNK):
            w, g = (X.reshape(1, -1)[:, start : start + CHUNK] for X in (W, G))
            yield w, g, first + start
    elif W.ndim > 2:
        for n in range(len(W)):
            yield from _pieces(W[n], G[n], first + n * W[n].numel())
    elif W.numel():
        yield (W, G, first) if W.ndim == 2 else (W.view(-1, 1), G.view(-1, 1), first)


class _Adam:
    """Adam's step of one parameter, by pieces."""

    def __init__(self, job: Job, loops: ModuleType) -> None:
        self._loops, self._writer = loops, Writer(job, loops)
        self._m, self._v = (job.state[key].numpy().reshape(-1) for key in "mv")
        step = job.state["step"].view(1) + 1
        self._corrections = [np.float32(float(c)) for c in bias_corrections(job, step)]
        self._lr = np.float32(float(rate(job, step)))

    def norm(self, piece: _Piece) -> float:
        """The norm of the gradient."""
        rows = np.empty(len(piece[1]), np.float32)
        X = Memory.of(piece[1]).floats((0, slice(0, len(rows))), self._loops)
        self._loops.row_norms(*X, len(rows), piece[1].shape[1], rows)
        return float(np.linalg.norm(rows))

    def step(self, piece: _Piece) -> TileChange | None:
        """Takes the gradient into the moments, and writes the weights."""
        (W, G, first), loops, writer = piece, self._loops, self._writer
        (a, b), whole = W.shape, (0, slice(0, len(W)))
        X, at, distance = Memory.of(G).floats(whole, loops)
        if a > 1:
            X, strided, narrow = np.empty(a * b, np.float32), at, X
            loops.widen(narrow.view(np.uint32), strided, distance, a, b, X.view(np.uint32), b)
            at = 0
        m, v = self._m[first : first + a * b], self._v[first : first + a * b]
        loops.take_moments(X[at : at + a * b], m, v, *writer.moments)
        update = np.empty(a * b, np.float32)
        loops.directions(m, v, *self._corrections, writer.eps, update)
        by_row, by_column = np.full(a, self._lr), np.ones(b, np.float32)
        source = (update.view(np.uint32), 0, b)
        return writer.write(Memory.of(W), whole, source, by_row, by_column, first)
