"""A new directory, of an adopt or an export: built under another name, and renamed once whole."""

from __future__ import annotations

import contextlib
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from apollo_grpc.errors import AlreadyExists
from apollo_trainer.checkpoints.disk import PIECE, FileOps, staged

_MARK = "apollo-new"
_UNFINISHED = re.compile(rf"\..+\.{_MARK}-[0-9a-f]{{12}}")


@contextlib.contextmanager
def new_directory(
    target: Path, ops: FileOps, taken: AlreadyExists, renaming: Callable[[], None]
) -> Iterator[Path]:
    """A folder to fill; flushed and renamed to `target` after the block, removed when it fails.

    Files in it must be on disk when the block ends. Another process does not remove the folder
    meanwhile: it is locked. Removes folders that killed processes left beside `target`.

    Args:
        taken: raised where `target` exists by the time of the rename.
        renaming: called right before the rename, the last moment at which the caller may fail.

    Raises OSError.
    """
    remove_unfinished(target.parent, ops)
    building = target.with_name(f".{target.name}.{_MARK}-{secrets.token_hex(6)}")
    with staged(building, ops):
        ops.mkdir(building, 0o755)
        with ops.locked(building):
            yield building
            _flush_folders(ops, building)
            renaming()
            try:
                ops.rename_new(building, target)
            except FileExistsError as error:
                raise taken from error
    ops.sync_folder(target.parent)


def remove_unfinished(parent: Path, ops: FileOps) -> None:
    """Removes what killed processes were building in a folder. Ignores errors."""
    with contextlib.suppress(OSError):
        for path in (parent / name for name in ops.names(parent) if _UNFINISHED.fullmatch(name)):
            # Whoever is building it holds the lock; an empty one may not be locked yet.
            if ops.is_folder(path) and ops.names(path):
                with contextlib.suppress(OSError), ops.locked(path):
                    ops.remove(path)


def copy_file(ops: FileOps, source: Path, target: Path) -> int:
    """Writes a new file with the content of another, links resolved; returns its size.

    The file is on disk then, its name is not before its folder's fsync. Raises OSError.
    """
    real, size = source.resolve(), 0
    mode = stat.S_IMODE(ops.stat(real).st_mode) | stat.S_IWUSR
    with ops.created(target, mode) as file:
        with ops.opened(real) as old:
            with contextlib.suppress(OSError):
                ops.clone(old, file)
                size = ops.stat(target).st_size
            while piece := ops.pread(old, PIECE, size):
                ops.write_all(file, memoryview(piece), size)
                ops.start_writing(file, len(piece), size)
                size += len(piece)
        ops.fsync(file)
    return size


def _flush_folders(ops: FileOps, folder: Path) -> None:
    for name in ops.names(folder):
        if ops.is_folder(folder / name):
            _flush_folders(ops, folder / name)
    ops.sync_folder(folder)
