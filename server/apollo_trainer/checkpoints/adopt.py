"""Adopt: a private copy of a model directory whose files are links or lie in a hub cache."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apollo_grpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from apollo_trainer.checkpoints.durable_write import TEMPORARY
from apollo_trainer.checkpoints.file_ops import FILES, FileOps
from apollo_trainer.checkpoints.no_replace import rename_without_replacing
from apollo_trainer.checkpoints.survey import Progress
from apollo_trainer.checkpoints.tensor_file import PIECE


@dataclass(frozen=True)
class Adoption:
    """The copy that was made."""

    directory: Path
    files: int
    bytes_written: int


def adopt_directory(
    source: Path, target: Path, progress: Progress = lambda *_: None, ops: FileOps = FILES
) -> Adoption:
    """Copies a directory to one of its own, every link resolved; it is there whole or not at all.

    Raises InvalidArgument for a relative path, AlreadyExists where something is there,
    FailedPrecondition where the source is no directory or the target's parent is none, OSError
    when the disk refuses; nothing is left behind then.
    """
    if not target.is_absolute():
        raise InvalidArgument.at("directory", "must be an absolute path on the server's machine")
    if not source.is_dir():
        raise FailedPrecondition(
            f"{source} is no local directory; nothing was copied.", reason="NOT_A_DIRECTORY"
        )
    _require_free(target, ops)
    beside = target.with_name(f".{target.name}.{TEMPORARY}adopt")
    files = list(_files(source))
    total = sum((source / name).stat().st_size for name in files)
    written = 0
    try:
        ops.remove(beside)
        ops.mkdir(beside, 0o755)
        for name in files:
            progress(written, total, str(name))
            _make_parents(beside, name, ops)
            written += _copy(source / name, beside / name, ops)
        for folder in sorted({beside, *(beside / n for f in files for n in f.parents)}):
            ops.sync_folder(folder)
        progress(written, total, target.name)
        try:
            rename_without_replacing(beside, target)
        except FileExistsError as error:
            raise _exists(target) from error
        ops.sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            ops.remove(beside)
        raise
    progress(total, total, "")
    return Adoption(target, len(files), written)


def _require_free(target: Path, ops: FileOps) -> None:
    if ops.found(target):
        raise _exists(target)
    if not target.parent.is_dir():
        raise FailedPrecondition(
            f"{target.parent} is no folder; nothing was copied. Make it first.",
            reason="NO_SUCH_FOLDER",
        )


def _exists(target: Path) -> AlreadyExists:
    return AlreadyExists(
        f"{target} exists already; it was left as it is. Name a folder that does not exist.",
        reason="FOLDER_EXISTS",
    )


def _files(source: Path) -> Iterator[Path]:
    """Regular files below a folder, by their relative paths; a link counts as what it points to."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and not path.name.endswith((".apollo-next", ".lock")):
            yield path.relative_to(source)


def _make_parents(folder: Path, name: Path, ops: FileOps) -> None:
    for parent in reversed(name.parents):
        if not ops.found(folder / parent):
            ops.mkdir(folder / parent, 0o755)


def _copy(source: Path, target: Path, ops: FileOps) -> int:
    real = source.resolve()
    file = ops.create(target, stat.S_IMODE(real.stat().st_mode) | stat.S_IWUSR)
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
