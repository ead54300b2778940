"""Live and host tensors exchange their values, piece by piece, with a rollback at any point."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apollo_grpc.errors import Internal
from apollo_trainer.checkpoints.disk import RunningDigest, digest, in_blocks, raw_bytes
from apollo_trainer.weights.checkpoint_reader import same_bytes

# Bytes that are exchanged at once: few enough to stay in a core's cache, where the digest reads
# them again.
PIECE = 2**20
# The same for a device: enough to be worth the calls.
FAR_PIECE = 2**23

_free_streams: dict[torch.device, list[Any]] = {}

# Bytes of the CPU: threads that each call torch would fight over its threads.
Values = Tensor | NDArray[np.uint8]


class _Pair:
    """Two tensors in pieces, live and host.

    Attributes:
        reached: how many pieces are exchanged, and the live values of the next one while it is
            written. One assignment sets both: an interrupt never finds half of it.
    """

    def __init__(self, live: Tensor, host: Tensor):
        live = live.detach()
        self.pieces: Sequence[tuple[Any, ...]]
        self.in_cache = live.device.type == "cpu" and live.is_contiguous()
        if self.in_cache:
            here, there = raw_bytes(live), raw_bytes(host)
            places = [slice(at, at + PIECE) for at in range(0, here.size, PIECE)]
            self.pieces = [(here[place], there[place]) for place in places]
        else:
            self.pieces = in_blocks(FAR_PIECE, live, host)
        self.reached: tuple[int, Values | None] = (0, None)

    def written(self) -> list[tuple[Values, Values]]:
        """Live pieces that were written, the last perhaps in part, with their old values."""
        done, old = self.reached
        whole = list(self.pieces[:done])
        return whole if old is None else [*whole, (self.pieces[done][0], old)]


class Exchange:
    """Exchanges that belong together, on any number of threads: `take_back` reverts all of them."""

    def __init__(self) -> None:
        self._pairs: list[_Pair] = []
        self._own = threading.local()

    @torch.no_grad()
    def run(self, live: Tensor, host: Tensor, *, read_back: bool = True) -> str:
        """Exchanges two tensors of one shape and dtype; `host` is contiguous. Waits for the device.

        Returns the digest of `live` afterwards; empty without `read_back`.
        """
        pair, running = _Pair(live, host), RunningDigest()
        self._pairs.append(pair)
        with _own_stream(live):
            for here, there in pair.pieces:
                self._piece(pair, here, there)
                if read_back and pair.in_cache:
                    running.update(here)
            if not read_back:
                return ""
            return running.value() if pair.in_cache else digest(live)

    def _piece(self, pair: _Pair, live: Any, host: Any) -> None:
        place = str(live.device) if isinstance(live, Tensor) else "bytes"
        # Fresh memory for each piece would cost many times what the copy does. Memory of a device
        # is written again in the order of the thread's stream.
        kept = self._own.__dict__.pop(place, None)
        scratch = _scratch(live) if kept is None or kept.nbytes < live.nbytes else kept
        old = scratch[: live.nbytes]
        if isinstance(live, Tensor):
            old = old.view(live.dtype).view(live.shape)
        _copy(old, live)
        done, _ = pair.reached
        pair.reached = (done, old)
        _write(live, host)
        _copy(host, old)
        pair.reached = (done + 1, None)
        # Not after a failure: the thread's next piece would overwrite the only old values.
        self._own.__dict__[place] = scratch

    @torch.no_grad()
    def take_back(self) -> None:
        """Writes all old values again, also after one failed; no `run` may be at work.

        Raises the first error, and Internal where a value does not read back.
        """
        written = [piece for pair in self._pairs for piece in pair.written()]
        for device in {live.device for live, _ in written if isinstance(live, Tensor)}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        errors = []
        for live, old in written:
            try:
                _write(live, old)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        for live, old in written:
            if not _same_bytes(live, old):
                raise Internal("a weight does not read back as it was written")


@contextmanager
def _own_stream(live: Tensor) -> Iterator[None]:
    """In the block, the thread has a stream of the device to itself; waits for it at the end.

    Streams are used again: torch keeps memory that was freed on a stream for that stream alone.
    """
    if not live.is_cuda:
        yield
        return
    free = _free_streams.setdefault(live.device, [])
    try:
        stream = free.pop()
    except IndexError:
        stream = torch.cuda.Stream(live.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(live.device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
    free.append(stream)


def _scratch(live: Values) -> Any:
    if isinstance(live, Tensor):
        size = max(FAR_PIECE, live.nbytes)
        return torch.empty(size, dtype=torch.uint8, device=live.device)
    return np.empty(PIECE, np.uint8)


def _write(live: Any, values: Any) -> None:
    _copy(live, values)


def _copy(target: Any, source: Any) -> None:
    if isinstance(target, Tensor):
        target.copy_(source, non_blocking=True)
    else:
        np.copyto(target, source)


def _same_bytes(live: Any, old: Any) -> bool:
    if isinstance(live, Tensor):
        return same_bytes(live.cpu(), old.cpu())
    return np.array_equal(live, old)
