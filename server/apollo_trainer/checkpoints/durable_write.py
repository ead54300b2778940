"""The durable write: after it returns, the file is on disk whole; before, the old one is."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file_beside(target: Path) -> Iterator[Path]:
    """A path beside `target` for a new version of it, removed again when the block fails."""
    path = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def flush_file(path: Path) -> None:
    """fsync. Raises OSError; the file must then be given up, its pages are marked clean."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """fsync of a folder: without it a rename may be undone by a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def durable_write(target: Path, write: Callable[[Path], None]) -> int:
    """Replaces `target` with what `write` puts into a new file; returns its size in bytes.

    Raises OSError with `target` as it was.
    """
    with new_file_beside(target) as path:
        write(path)
        if target.exists():
            shutil.copymode(target, path)
        flush_file(path)
        size = path.stat().st_size
        path.replace(target)
    flush_folder(target.parent)
    return size
