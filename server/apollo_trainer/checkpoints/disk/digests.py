"""Digests: they tell whether bytes came back as they were, never who wrote them.

All are XXH3 of 128 bits. A manifest holds the 32 hexadecimal digits alone (`hex_digest`); a
snapshot has "xxh3-128:" before them (`digest`, `file_digest`, `RunningDigest.value`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from apollo_trainer.checkpoints.disk.file_ops import FILES, FileOps

_ALGORITHM = "xxh3-128"
_DIGEST = re.compile(rf"{_ALGORITHM}:[0-9a-f]{{32}}")
# Bytes of a file that are read at once: they stay in the core's cache.
_PIECE = 2**19
# Bytes of a device's memory that are copied at once: enough to be worth the call.
_DEVICE_PIECE = 2**23
_own = threading.local()


class RunningDigest:
    """The digest of bytes that come in parts. Releases the interpreter's lock meanwhile."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, part: NDArray[Any] | memoryview | bytes) -> None:
        """Takes the bytes that follow."""
        self._hash.update(part.data if isinstance(part, np.ndarray) else part)

    def hex(self) -> str:
        """The 32 hexadecimal digits."""
        return self._hash.hexdigest()

    def value(self) -> str:
        """The digits with "xxh3-128:" before them."""
        return f"{_ALGORITHM}:{self.hex()}"


def hex_digest(parts: Iterable[NDArray[Any] | memoryview | bytes]) -> str:
    """The 32 hexadecimal digits of the digest of bytes that come in parts."""
    running = RunningDigest()
    for part in parts:
        running.update(part)
    return running.hex()


def digest(tensor: torch.Tensor) -> str:
    """The digest of a tensor's bytes in row-major order: "xxh3-128:" and 32 hexadecimal digits."""
    return f"{_ALGORITHM}:{hex_digest(_parts(tensor.detach()))}"


def file_digest(path: Path, ops: FileOps = FILES) -> str:
    """The same of a file's bytes; reads it piece by piece. Raises OSError."""
    running, piece, at = RunningDigest(), np.empty(_PIECE, np.uint8), 0
    with ops.opened(path) as file:
        while size := ops.preadv(file, piece.data, at):
            running.update(piece[:size])
            at += size
    return running.value()


def matches(tensor: torch.Tensor, expected: str) -> bool:
    """Whether a tensor has this digest. Raises ValueError where `expected` is no digest."""
    algorithm_of(expected)
    return digest(tensor) == expected


def algorithm_of(expected: str) -> str:
    """The algorithm of a digest. Raises ValueError where `expected` is no digest."""
    if not _DIGEST.fullmatch(expected):
        raise ValueError(f"{expected[:60]!r} is no digest")
    return _ALGORITHM


def raw_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 [bytes] of a tensor in row-major order; shares the memory of a contiguous CPU one."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def in_blocks(size: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Splits tensors of one shape alike, in order; each block holds a view of every tensor.

    A block has at most `size` bytes where the first tensor is contiguous. Otherwise it has as many
    rows as fit into `size`, at least one.
    """
    first = tensors[0]
    if first.is_contiguous():
        tensors, row = tuple(tensor.view(-1) for tensor in tensors), first.element_size()
    else:
        row = first[0].nbytes
    return list(zip(*(torch.split(t, max(1, size // row)) for t in tensors), strict=True))


def _parts(tensor: torch.Tensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes in parts. Copies those of a device through pinned memory, a piece per thread."""
    if not tensor.is_cuda:
        yield raw_bytes(tensor)
        return
    if not hasattr(_own, "piece"):
        _own.piece = torch.empty(_DEVICE_PIECE, dtype=torch.uint8, pin_memory=True)
    for (block,) in in_blocks(_DEVICE_PIECE, tensor):
        flat = block.contiguous().view(-1).view(torch.uint8)
        for part in torch.split(flat, _DEVICE_PIECE):
            yield _own.piece[: part.numel()].copy_(part).numpy()
