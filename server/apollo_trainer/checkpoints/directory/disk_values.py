"""The bytes that a tensor is to have on disk: the live values, in the dtype of the directory.

An engine rounds what it loads to the dtype that it serves. A live value that equals the rounded
value on disk was not trained: the disk keeps its bits. A trained value is written in the dtype of
the disk. A value that an undo brought back gets the bits that it had before the last sync.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.disk import (
    DTYPES,
    PIECE,
    FileOps,
    TensorPlace,
    hex_digest,
    pieces_at,
    pieces_of,
    raw_bytes,
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
    """The bytes, a bounded piece at a time. Reads files only where their values are needed.

    Args:
        path: the file that holds the tensor at `place` now.
        live: the live values, contiguous, on the CPU, of the same shape; None for what belongs to
            no parameter, and stays as it is.
        earlier: the file that held it there before the last sync; None where there is none.

    Raises FailedPrecondition for a live value that the dtype on disk cannot hold, and OSError.
    """
    if live is not None and live.dtype == DTYPES[place.dtype]:
        yield from pieces_of(live)
        return
    with ops.opened(path) as file:
        if live is None:
            yield from pieces_at(ops, file, place)
            return
        for there, part, was in _blocks(ops, file, place, live, earlier):
            _put_trained(there, part, place, was)
            yield raw_bytes(there).data


def differs(
    ops: FileOps,
    path: Path,
    place: TensorPlace,
    live: torch.Tensor,
    digest: str,
    earlier: Path | None = None,
) -> bool:
    """Whether `bytes_to_write` differ from the bytes on disk, whose hex digest is given."""
    if live.dtype == DTYPES[place.dtype]:
        return hex_digest(pieces_of(live)) != digest
    with ops.opened(path) as file:
        return any(
            _put_trained(there, part, place, was)
            for there, part, was in _blocks(ops, file, place, live, earlier)
        )


def loses_digits(live: torch.dtype, place: TensorPlace) -> bool:
    """Whether the dtype on disk cannot hold every value of the live dtype."""
    on_disk = DTYPES[place.dtype]
    if live == on_disk:
        return False
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return not {live, on_disk} <= set(known) or torch.promote_types(live, on_disk) != on_disk


def _blocks(
    ops: FileOps, file: int, place: TensorPlace, live: torch.Tensor, earlier: Path | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Blocks of the values on disk (a copy), the live values, and those before the last sync."""
    dtype, flat = DTYPES[place.dtype], live.view(-1)
    count = PIECE // dtype.itemsize
    for at in range(0, flat.numel(), count):
        part, start = flat[at : at + count], place.start + at * dtype.itemsize
        data = bytearray(part.numel() * dtype.itemsize)
        ops.read_all(file, memoryview(data), start)
        there = torch.frombuffer(data, dtype=dtype)
        yield there, part, _earlier(ops, earlier, start, there)


def _earlier(ops: FileOps, path: Path | None, start: int, now: torch.Tensor) -> torch.Tensor:
    """The values before the last sync; where they cannot be read, those on disk now."""
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
    """Puts the trained values into `there`; returns whether that changed a bit."""
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
