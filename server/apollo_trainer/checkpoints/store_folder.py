"""A folder of folders, each built aside, made durable and renamed: what exists is complete."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_trainer.checkpoints.durable_write import flush_file, flush_folder

_ENTRY = re.compile(r"([0-9]{8})-[0-9a-f]{12}")
_PRIVATE = 0o700


class StoreFolder:
    """`<root>/<kind>/<id>/`, where ids are numbered and never used again.

    Args:
        root: the state folder of a model; made where it is missing.
        kind: `anchors` or `snapshots`.
    """

    def __init__(self, root: Path, kind: str):
        self.path, self._trash = root / kind, root / "trash"
        for folder in (self.path, self._trash):
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        for folder in (root.parent, root):
            flush_folder(folder)

    def ids(self) -> list[str]:
        """Complete entries, the oldest first."""
        return sorted(p.name for p in self.path.iterdir() if _ENTRY.fullmatch(p.name))

    def clean(self) -> None:
        """Removes what a crash left: half-made entries, and what was thrown away."""
        for left in (*self.path.glob("tmp-*"), *self._trash.iterdir()):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def building(self) -> Iterator[tuple[str, Path]]:
        """A new id, and a folder that `publish` renames; removed again where it was not."""
        numbers = [int(i.split("-")[0]) for i in self.ids()]
        new = f"{max(numbers, default=0) + 1:08d}-{uuid.uuid4().hex[:12]}"
        folder = self.path / f"tmp-{new}"
        folder.mkdir(mode=_PRIVATE)
        try:
            yield new, folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, new: str) -> None:
        """Makes a built entry durable under its id. Raises OSError with no entry left."""
        folder, target = self.path / f"tmp-{new}", self.path / new
        flush_tree(folder)
        folder.rename(target)
        try:
            flush_folder(self.path)
        except OSError:
            # It would be there now and perhaps gone after a power failure.
            target.rename(folder)
            raise

    def remove(self, old: str) -> None:
        """Throws an entry away: whole before, gone after, whatever happens between."""
        thrown = self._trash / f"{old}-{uuid.uuid4().hex[:8]}"
        (self.path / old).rename(thrown)
        flush_folder(self.path)
        flush_folder(self._trash)
        shutil.rmtree(thrown, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """fsync of every file and folder below."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            flush_folder(path)
        else:
            flush_file(path)
    flush_folder(folder)


def own_bytes(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
