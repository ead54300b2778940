"""Adopt: a private copy of a model directory whose files are links or lie in a hub cache.

It holds what the files hold, which is not what was learned since vLLM loaded them: that an export
writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apollo_grpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Resource
from apollo_trainer.checkpoints.directory.new_directory import copy_file, new_directory
from apollo_trainer.checkpoints.directory.survey import Progress
from apollo_trainer.checkpoints.disk import FILES, FileOps


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
    taken = _refuse(source, target, ops)
    files = _files(source)
    total = sum((source / name).stat().st_size for name in files)
    written = 0
    with new_directory(target, ops, taken, lambda: progress(written, total, target.name)) as folder:
        for name in files:
            progress(written, total, str(name))
            ops.make_folders((folder / name).parent, 0o755)
            written += copy_file(ops, source / name, folder / name)
    progress(total, total, "")
    return Adoption(target, len(files), written)


def _refuse(source: Path, target: Path, ops: FileOps) -> AlreadyExists:
    """Raises what forbids the copy; returns the refusal of a target that appears meanwhile."""
    if not target.is_absolute():
        raise InvalidArgument.at("directory", "must be an absolute path on the server's machine")
    if not source.is_dir():
        raise FailedPrecondition(
            f"{source} is no local directory; nothing was copied.", reason="NOT_A_DIRECTORY"
        )
    taken = AlreadyExists(
        f"{target} exists already; it was left as it is. Name a folder that does not exist.",
        reason="FOLDER_EXISTS",
        resource=Resource("directory", str(target)),
    )
    if ops.found(target):
        raise taken
    if not target.parent.is_dir():
        raise FailedPrecondition(
            f"{target.parent} is no folder; nothing was copied. Make it first.",
            reason="NO_SUCH_FOLDER",
        )
    return taken


def _files(source: Path) -> list[Path]:
    """Regular files below a folder, by their relative paths; a link counts as what it points to."""
    return [
        path.relative_to(source)
        for path in sorted(source.rglob("*"))
        if path.is_file() and not path.name.endswith((".apollo-next", ".lock"))
    ]
