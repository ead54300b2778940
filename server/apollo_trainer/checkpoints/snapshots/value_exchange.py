"""Live and host tensors exchange their values, piece by piece, with a way back from any point."""

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
# A device is far away: what is copied there and back must be worth the way.
FAR_PIECE = 2**23

_free_streams: dict[torch.device, list[Any]] = {}

# Bytes of the CPU: threads that each call torch would fight over its threads.
Values = Tensor | NDArray[np.uint8]


class _Pair:
    """Two tensors in pieces, live and host.

    Attributes:
        reached: pieces that were exchanged; the live values of the next while it is written. One
            assignment says both, so that an interrupt finds a way back.
    """

    def __init__(self, live: Tensor, host: Tensor):
        live = live.detach()
        self.pieces: Sequence[tuple[Any, ...]]
        if _is_flat_here(live):
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
    """Exchanges that were made, and those that are being made; threads may make them."""

    def __init__(self) -> None:
        self._pairs: list[_Pair] = []
        self._own = threading.local()

    @torch.no_grad()
    def run(self, live: Tensor, host: Tensor, *, read_back: bool = True) -> str:
        """Exchanges two tensors of one shape and dtype; `host` is contiguous. Waits for the device.

        Returns the digest that `live` has then; empty where it is not to be read back.
        """
        pair, running = _Pair(live, host), RunningDigest()
        self._pairs.append(pair)
        in_cache = _is_flat_here(live)
        with _stream_beside(live):
            for here, there in pair.pieces:
                self._piece(pair, here, there)
                if read_back and in_cache:
                    running.update(here)
            if not read_back:
                return ""
            return running.value() if in_cache else digest(live)

    def _piece(self, pair: _Pair, live: Any, host: Any) -> None:
        place = str(live.device) if isinstance(live, Tensor) else "bytes"
        # Fresh memory for each piece costs many times what the copy does. A device's is written
        # again in the order of the thread's stream.
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
        """Writes the old values again, all of them; raises what forbids it, and on a mismatch."""
        written = [piece for pair in self._pairs for piece in pair.written()]
        for device in {live.device for live, _ in written if isinstance(live, Tensor)}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        errors = []
        for live, old in written:
            try:
                _write(live, old)
            except Exception as error:
                # The others may still be had.
                errors.append(error)
        if errors:
            raise errors[0]
        for live, old in written:
            if not _same_bytes(live, old):
                raise Internal("a weight does not read back as it was written")


@contextmanager
def _stream_beside(live: Tensor) -> Iterator[None]:
    """A stream of the device's beside those of other threads; waits for it at the end.

    One of few: memory that was freed on a stream is kept for that one alone.
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


def _is_flat_here(live: Tensor) -> bool:
    return live.device.type == "cpu" and live.is_contiguous()


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
