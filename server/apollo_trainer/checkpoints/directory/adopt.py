"""Adopt: a private copy of a model directory whose files are links or lie in a hub cache.

It holds what the files hold, which is not what was learned since vLLM loaded them: that an export
writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apollo_grpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from apollo_trainer.checkpoints.directory.survey import Progress
from apollo_trainer.checkpoints.disk import (
    FILES,
    FileOps,
    copy_file,
    flush_folders,
    new_folder_beside,
)


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

    The live weights are not read.

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
    files = list(_files(source))
    total = sum((source / name).stat().st_size for name in files)
    written = 0
    with new_folder_beside(target, ops) as building:
        for name in files:
            progress(written, total, str(name))
            _make_parents(building, name, ops)
            written += copy_file(ops, source / name, building / name)
        flush_folders(ops, building)
        progress(written, total, target.name)
        try:
            ops.rename_new(building, target)
        except FileExistsError as error:
            raise _exists(target) from error
    ops.sync_folder(target.parent)
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
