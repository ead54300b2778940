"""Digests of tensors: they tell whether bytes came back as they were, never who wrote them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from apollo_trainer.checkpoints.disk.file_ops import FILES, FileOps

_XXH3, _DIGITS = "xxh3-128", 32
# Bytes of a file that are read at once: they stay in the core's cache.
_PIECE = 2**19
# Bytes of a device's memory that are copied at once: enough to be worth the call.
_DEVICE_PIECE = 2**23
_HEXADECIMAL = frozenset("0123456789abcdef")
_own = threading.local()


def raw_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 [bytes] of a tensor in row-major order; shares the memory of a contiguous CPU one."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(tensor: torch.Tensor) -> str:
    """ "<algorithm>:<hexadecimal>" of the bytes in row-major order."""
    running = RunningDigest()
    for part in _parts(tensor.detach()):
        running.update(part)
    return running.value()


def _parts(tensor: torch.Tensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes; those of a device come through a piece of pinned memory of the thread's own."""
    if not tensor.is_cuda:
        yield raw_bytes(tensor)
        return
    if not hasattr(_own, "piece"):
        _own.piece = torch.empty(_DEVICE_PIECE, dtype=torch.uint8, pin_memory=True)
    for (block,) in in_blocks(_DEVICE_PIECE, tensor):
        flat = block.contiguous().view(-1).view(torch.uint8)
        for part in torch.split(flat, _DEVICE_PIECE):
            yield _own.piece[: part.numel()].copy_(part).numpy()


def in_blocks(size: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Tensors of one shape in views that go together, in order.

    Flat ones of at most `size` bytes where the first tensor is contiguous; otherwise as many of
    its rows, but one at least.
    """
    first = tensors[0]
    if first.is_contiguous():
        tensors, row = tuple(tensor.view(-1) for tensor in tensors), first.element_size()
    else:
        row = first[0].nbytes
    return list(zip(*(torch.split(t, max(1, size // row)) for t in tensors), strict=True))


def file_digest(path: Path, ops: FileOps = FILES) -> str:
    """Of a file's bytes, likewise; it is read piece by piece. Raises OSError."""
    running, piece, at = RunningDigest(), np.empty(_PIECE, np.uint8), 0
    with ops.opened(path) as file:
        while size := ops.preadv(file, piece.data, at):
            running.update(piece[:size])
            at += size
    return running.value()


class RunningDigest:
    """The digest of bytes that come in parts. The interpreter's lock is released meanwhile."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, part: NDArray[Any]) -> None:
        """The next ones, without gaps."""
        self._hash.update(part.view(np.uint8).data)

    def value(self) -> str:
        """As of `digest`."""
        return f"{_XXH3}:{self._hash.hexdigest()}"


def matches(tensor: torch.Tensor, expected: str) -> bool:
    """Whether the bytes have this digest. Raises ValueError for what is none."""
    algorithm_of(expected)
    return digest(tensor) == expected


def algorithm_of(expected: str) -> str:
    """The algorithm of a digest. Raises ValueError for what is none."""
    name, _, value = expected.partition(":")
    if name != _XXH3 or len(value) != _DIGITS or not set(value) <= _HEXADECIMAL:
        raise ValueError(f"{expected[:60]!r} is no digest")
    return name
