"""The bytes that a tensor is to have on disk: the live values, in the dtype of the directory.

An engine rounds what it loads to the dtype that it serves. A value that still is what the one on
disk rounds to was not trained, and keeps its bits; one that was is written in the disk's dtype. One
that came back, by an undo of what was synced last, gets the bits that it had before that sync.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.disk import (
    DTYPES,
    NAME_OF,
    PIECE,
    FileOps,
    TensorPlace,
    bytes_of,
    digest_of_pieces,
    pieces_at,
    pieces_of,
)

# Few enough for the core's cache, and for torch to take no threads: they wait for each other at
# every operation, and the engine has the cores.
_ELEMENTS = 3 << 13
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bytes_to_write(
    ops: FileOps,
    path: Path,
    place: TensorPlace,
    live: torch.Tensor | None,
    earlier: Path | None = None,
) -> Iterator[memoryview]:
    """The bytes, a bounded piece at a time. Files are read only where their values are needed.

    Args:
        path: the file that holds the tensor at `place` now.
        live: the live values, contiguous, on the CPU, of the same shape; None for what belongs to
            no parameter, and stays as it is.
        earlier: the file that held it there before the last sync; None where there is none.

    Raises FailedPrecondition for a live value that the dtype on disk cannot hold, and OSError.
    """
    if live is not None and NAME_OF[live.dtype] == place.dtype:
        yield from pieces_of(bytes_of(live))
        return
    with ops.opened(path) as file:
        if live is None:
            yield from pieces_at(ops, file, place)
            return
        for there, part, was in _blocks(ops, file, place, live, earlier):
            _put_trained(there, part, place, was)
            yield bytes_of(there)


def differs(
    ops: FileOps,
    path: Path,
    place: TensorPlace,
    live: torch.Tensor,
    digest: str,
    earlier: Path | None = None,
) -> bool:
    """Whether `bytes_to_write` are others than those of the file, whose digest this is."""
    if NAME_OF[live.dtype] == place.dtype:
        return digest_of_pieces(pieces_of(bytes_of(live))) != digest
    with ops.opened(path) as file:
        return any(
            _put_trained(there, part, place, was)
            for there, part, was in _blocks(ops, file, place, live, earlier)
        )


def loses_digits(live: torch.dtype, place: TensorPlace) -> bool:
    """Whether some values of the live dtype have no equal in the one on disk."""
    on_disk = DTYPES[place.dtype]
    if live == on_disk:
        return False
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return not {live, on_disk} <= set(known) or torch.promote_types(live, on_disk) != on_disk


def _blocks(
    ops: FileOps, file: int, place: TensorPlace, live: torch.Tensor, earlier: Path | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Values on disk, in memory of their own, the live ones of the same place, and earlier ones."""
    dtype, flat = DTYPES[place.dtype], live.view(-1)
    count = PIECE // dtype.itemsize
    for at in range(0, flat.numel(), count):
        part, start = flat[at : at + count], place.start + at * dtype.itemsize
        data = bytearray(part.numel() * dtype.itemsize)
        ops.read_all(file, memoryview(data), start)
        there = torch.frombuffer(data, dtype=dtype)
        yield there, part, _earlier(ops, earlier, start, there)


def _earlier(ops: FileOps, path: Path | None, start: int, now: torch.Tensor) -> torch.Tensor:
    """The values of before the last sync; those of now where they cannot be had."""
    data = bytearray(now.nbytes)
    # A sync needs them for nothing else than digits that the engine does not see.
    with contextlib.suppress(OSError):
        if path is not None:
            with ops.opened(path) as file:
                ops.read_all(file, memoryview(data), start)
            return torch.frombuffer(data, dtype=now.dtype)
    return now


def _put_trained(
    there: torch.Tensor, live: torch.Tensor, place: TensorPlace, earlier: torch.Tensor
) -> bool:
    """Puts into `there` what it does not round to; returns whether that changed a bit."""
    changed = False
    blocks = (torch.split(values, _ELEMENTS) for values in (there, live, earlier))
    for old, part, was in zip(*blocks, strict=True):
        trained = _bits(old.to(part.dtype)) != _bits(part)
        if trained.any():
            came_back = trained & (_bits(was.to(part.dtype)) == _bits(part))
            new = torch.where(trained, _in_dtype(part, trained & ~came_back, place), old)
            new = torch.where(came_back, was, new)
            changed = changed or not torch.equal(_bits(new), _bits(old))
            old.copy_(new)
    return changed


def _in_dtype(part: torch.Tensor, trained: torch.Tensor, place: TensorPlace) -> torch.Tensor:
    dtype = DTYPES[place.dtype]
    written = part.to(dtype)
    if loses_digits(part.dtype, place):
        fits = dtype.is_floating_point and bool(
            (written.double().isfinite() | ~part.double().isfinite() | ~trained).all()
        )
        if not fits:
            raise FailedPrecondition(
                f"A tensor of the directory is {place.dtype}, and a live value of it is one that "
                "this cannot hold. Nothing was written. A snapshot keeps what was "
                "learned (`apollo checkpoint create`); to go on, undo or restore, and train with a "
                "smaller learning rate.",
                reason="VALUE_DOES_NOT_FIT",
            )
    return written


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Bits, not values: NaN differs from itself and zeros of both signs do not."""
    return values.view(_BITS[values.itemsize])
