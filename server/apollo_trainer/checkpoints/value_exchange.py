"""Live and host tensors exchange their values, piece by piece, with a way back from any point.

Threads exchange at the same time, each in memory of its own. Whatever one of them raises, the
others end before their next piece; only then is anything taken back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apollo_grpc.errors import Internal
from apollo_trainer.checkpoints.spread import spread
from apollo_trainer.weights.checkpoint_reader import same_bytes

PIECE = 2**18  # elements that are exchanged at once: what stays in a core's cache
# A device is far away: what is copied there and back must be worth the way.
_FAR = 64
# Pieces that a thread exchanges before it takes the next ones.
_TASK = 64


class Exchange:
    """Exchanges that were made, and those that are being made."""

    def __init__(self) -> None:
        self._done: list[tuple[Tensor, Tensor]] = []
        self._begun: dict[int, tuple[Tensor, Tensor]] = {}
        self._own = threading.local()
        self._failed = False

    def run_all(self, pairs: Iterable[tuple[Tensor, Tensor]], threads: int) -> None:
        """Exchanges live and host tensors, each as `run`; live ones that share no memory."""
        tasks = [task for live, host in pairs for task in _parts(live, host, _TASK * PIECE)]
        spread(lambda task: self.run(*task), tasks, threads)

    @torch.no_grad()
    def run(self, live: Tensor, host: Tensor) -> None:
        """Exchanges two tensors of one shape and dtype; `host` is contiguous."""
        size = PIECE * (_FAR if live.is_cuda else 1)
        try:
            for here, there in _parts(live, host, size):
                # A thread that failed would write over what it needs for the way back.
                if self._failed:
                    return
                self._piece(here, there)
        except BaseException:
            self._failed = True
            raise

    def _piece(self, live: Tensor, host: Tensor) -> None:
        thread = threading.get_ident()
        old = self._memory(live)
        _copy(old, live)
        self._begun[thread] = (live, old)
        _write(live, host)
        _copy(host, old)
        self._done.append((live, host))
        del self._begun[thread]

    def _memory(self, live: Tensor) -> Tensor:
        # Fresh memory for each piece costs many times what the copy does.
        memory: dict[torch.dtype, Tensor] = self._own.__dict__.setdefault("memory", {})
        kept = memory.get(live.dtype)
        if kept is None or kept.numel() < live.numel():
            size = max(PIECE, live.numel())
            kept = torch.empty(size, dtype=live.dtype, pin_memory=live.is_cuda)
            memory[live.dtype] = kept
        return kept[: live.numel()].view(live.shape)

    @torch.no_grad()
    def take_back(self) -> None:
        """Writes the old values again, all of them; raises what forbids it, and on a mismatch."""
        pieces = [*self._done, *self._begun.values()]
        for live, old in pieces:
            _write(live, old)
        for live, old in pieces:
            if not same_bytes(live.cpu(), old):
                raise Internal("a weight does not read back as it was written")


def _parts(live: Tensor, host: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in parts of so many elements; whole where the live one has gaps or lies transposed."""
    live = live.detach()
    if not live.is_contiguous():
        yield live, host
        return
    here, there = live.view(-1), host.view(-1)
    for start in range(0, here.numel(), size):
        yield here[start : start + size], there[start : start + size]


def _write(live: Tensor, values: Tensor) -> None:
    _copy(live, values)


def _copy(target: Tensor, source: Tensor) -> None:
    tensors = (target, source)
    if any(t.is_cuda or not t.is_contiguous() for t in tensors):
        target.copy_(source)
        return
    # torch's copy would bring threads of its own for each thread that calls it.
    np.copyto(*(_bytes(t) for t in tensors))


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy()
