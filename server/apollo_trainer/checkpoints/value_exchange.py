"""Live and host tensors exchange their values, piece by piece, with a way back from any point."""

from __future__ import annotations

import torch
from torch import Tensor

from apollo_grpc.errors import Internal
from apollo_trainer.weights.checkpoint_reader import same_bytes

# Elements that are exchanged at once: few enough to stay in the cache that cores share, many
# enough for torch's threads. Threads that each call torch would fight over those.
PIECE = 2**20
# A device is far away: what is copied there and back must be worth the way.
_FAR = 16


class Exchange:
    """Exchanges that were made, and the one that is being made."""

    def __init__(self) -> None:
        self._done: list[tuple[Tensor, Tensor]] = []
        self._begun: tuple[Tensor, Tensor] | None = None
        self._scratch: dict[torch.dtype, Tensor] = {}

    @torch.no_grad()
    def run(self, live: Tensor, host: Tensor) -> None:
        """Exchanges two tensors of one shape and dtype; `host` is contiguous."""
        live = live.detach()
        if not live.is_contiguous():
            self._piece(live, host)
            return
        here, there, size = live.view(-1), host.view(-1), PIECE * (_FAR if live.is_cuda else 1)
        for start in range(0, here.numel(), size):
            part = slice(start, start + size)
            self._piece(here[part], there[part])

    def _piece(self, live: Tensor, host: Tensor) -> None:
        old = self._memory(live).copy_(live)
        self._begun = (live, old)
        _write(live, host)
        host.copy_(old)
        self._done.append((live, host))
        self._begun = None

    def _memory(self, live: Tensor) -> Tensor:
        # Fresh memory for each piece costs many times what the copy does.
        kept = self._scratch.get(live.dtype)
        if kept is None or kept.numel() < live.numel():
            size = max(PIECE, live.numel())
            kept = torch.empty(size, dtype=live.dtype, pin_memory=live.is_cuda)
            self._scratch[live.dtype] = kept
        return kept[: live.numel()].view(live.shape)

    @torch.no_grad()
    def take_back(self) -> None:
        """Writes the old values again, all of them; raises what forbids it, and on a mismatch."""
        pieces = [*self._done, self._begun] if self._begun else self._done
        for live, old in pieces:
            _write(live, old)
        for live, old in pieces:
            if not same_bytes(live.cpu(), old):
                raise Internal("a weight does not read back as it was written")


def _write(live: Tensor, values: Tensor) -> None:
    live.copy_(values)
