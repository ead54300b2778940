"""Durable writes: once one has returned, the new file is on disk whole; until then the old one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from apollo_trainer.checkpoints.disk.file_ops import FILES, FileOps

TEMPORARY = "tmp-"


@contextlib.contextmanager
def staged(path: Path, ops: FileOps) -> Iterator[Path]:
    """A path to build a file or a folder at; removes it after the block unless it was renamed."""
    try:
        yield path
    finally:
        # What made the block fail must be told, not that its remains could not be removed.
        with contextlib.suppress(OSError):
            ops.remove(path)


@contextlib.contextmanager
def _staged_beside(target: Path, ops: FileOps) -> Iterator[Path]:
    new = target.with_name(f"{TEMPORARY}{target.name}")
    ops.remove(new)
    with staged(new, ops):
        yield new


def durable_write(target: Path, write: Callable[[Path], object], ops: FileOps = FILES) -> int:
    """Replaces `target` with what `write` puts into a new file; returns its size in bytes.

    Keeps owner, mode and attributes. Raises OSError with `target` as it was. One thread and one
    process at a time: the new file always has the same name, so that the next one removes what
    a kill left.
    """
    with _staged_beside(target, ops) as new:
        write(new)
        if ops.found(target):
            ops.copy_attributes(target, new)
        flush_file(new, ops)
        size = ops.stat(new).st_size
        ops.rename(new, target)
    ops.sync_folder(target.parent)
    return size


def durable_bytes(target: Path, data: bytes, ops: FileOps = FILES) -> None:
    """Replaces a small file, likewise. Raises OSError with `target` as it was, or durable."""
    with _staged_beside(target, ops) as new:
        write_new(new, data, ops)
        ops.rename(new, target)
    ops.sync_folder(target.parent)


def write_new(path: Path, data: bytes, ops: FileOps, mode: int = 0o600) -> None:
    """Writes and flushes a new file; its name is on disk only after its folder's fsync."""
    with ops.created(path, mode) as file:
        ops.write_all(file, memoryview(data), 0)
        ops.fsync(file)


def flush_file(path: Path, ops: FileOps = FILES) -> None:
    """fsync. Raises OSError; the file must then be given up, its pages are marked clean."""
    with ops.opened(path, write=True) as file:
        ops.fsync(file)


def flush_folder(folder: Path) -> None:
    """fsync of a folder: without it a power failure may undo a rename. Raises OSError."""
    FILES.sync_folder(folder)
