"""A folder that is built aside and gets its name once it is whole; what a crash left, goes."""

from __future__ import annotations

import contextlib
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_trainer.checkpoints.disk.file_ops import FileOps
from apollo_trainer.checkpoints.disk.tensor_file import PIECE

_MARK = "apollo-new"
_UNFINISHED = re.compile(rf"\..+\.{_MARK}-[0-9a-f]{{12}}")


@contextmanager
def new_folder_beside(target: Path, ops: FileOps) -> Iterator[Path]:
    """A locked folder beside `target`, to be renamed to it; removed where that did not happen.

    Removes others there that nobody is building any more. Raises OSError.
    """
    remove_unfinished(target.parent, ops)
    path = target.with_name(f".{target.name}.{_MARK}-{uuid.uuid4().hex[:12]}")
    try:
        ops.mkdir(path, 0o755)
        with ops.locked(path):
            yield path
    finally:
        # What made the block fail must be told, not that its remains could not be removed.
        with contextlib.suppress(OSError):
            ops.remove(path)


def remove_unfinished(parent: Path, ops: FileOps) -> None:
    """Removes what processes that were killed had begun in a folder; errors are nobody's."""
    with contextlib.suppress(OSError):
        for name in ops.names(parent):
            if not _UNFINISHED.fullmatch(name) or not _is_folder(ops, parent / name):
                continue
            # Whoever is building it holds the lock; an empty one may not be locked yet.
            if ops.names(parent / name):
                with contextlib.suppress(OSError), ops.locked(parent / name):
                    ops.remove(parent / name)


def _is_folder(ops: FileOps, path: Path) -> bool:
    found = ops.found(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def flush_folders(ops: FileOps, folder: Path) -> None:
    """fsync of a folder and of all below it, the deepest first; files are on disk already."""
    for name in ops.names(folder):
        if _is_folder(ops, folder / name):
            flush_folders(ops, folder / name)
    ops.sync_folder(folder)


def copy_file(ops: FileOps, source: Path, target: Path) -> int:
    """A new file with the content of the one that a path leads to, on disk; returns its bytes."""
    real = source.resolve()
    mode = stat.S_IMODE(ops.stat(real).st_mode) | stat.S_IWUSR
    file = ops.create(target, mode)
    try:
        with ops.opened(real) as old:
            size = 0
            with contextlib.suppress(OSError):
                ops.clone(old, file)
                size = ops.stat(target).st_size
            while piece := ops.pread(old, PIECE, size):
                ops.write_all(file, memoryview(piece), size)
                ops.start_writing(file, len(piece), size)
                size += len(piece)
        ops.fsync(file)
    finally:
        ops.close(file)
    return size
