"""The durable write: after it returns, the file is on disk whole; before, the old one is."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_trainer.checkpoints.disk.file_ops import FILES, FileOps

TEMPORARY = "tmp-"


@contextmanager
def new_file_beside(target: Path, ops: FileOps = FILES) -> Iterator[Path]:
    """A path beside `target` for a new version of it, removed again when the block fails."""
    path = target.with_name(f".{target.name}.{TEMPORARY}{uuid.uuid4().hex[:12]}")
    try:
        yield path
    finally:
        # What made the block fail must be told, not that its remains could not be removed.
        with contextlib.suppress(OSError):
            ops.remove(path)


def flush_file(path: Path, ops: FileOps = FILES) -> None:
    """fsync. Raises OSError; the file must then be given up, its pages are marked clean."""
    with ops.opened(path, write=True) as file:
        ops.fsync(file)


def flush_folder(folder: Path, ops: FileOps = FILES) -> None:
    """fsync of a folder: without it a rename may be undone by a power failure."""
    ops.sync_folder(folder)


def durable_write(target: Path, write: Callable[[Path], object], ops: FileOps = FILES) -> int:
    """Replaces `target` with what `write` puts into a new file; returns its size in bytes.

    Raises OSError with `target` as it was.
    """
    with new_file_beside(target, ops) as path:
        write(path)
        if ops.found(target):
            ops.copy_attributes(target, path)
        flush_file(path, ops)
        size = ops.stat(path).st_size
        ops.rename(path, target)
    flush_folder(target.parent, ops)
    return size


def durable_bytes(target: Path, data: bytes, ops: FileOps = FILES) -> None:
    """Replaces a small file. Raises OSError with `target` as it was, or durable already."""
    path = target.with_name(f"{TEMPORARY}{target.name}")
    ops.remove(path)
    try:
        write_new(path, data, ops)
        ops.rename(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            ops.remove(path)
        raise
    flush_folder(target.parent, ops)


def write_new(path: Path, data: bytes, ops: FileOps, mode: int = 0o600) -> None:
    """A new file with its content on disk; its name is not, before the folder's fsync."""
    file = ops.create(path, mode)
    try:
        ops.write_all(file, memoryview(data), 0)
        ops.fsync(file)
    finally:
        ops.close(file)
