"""A folder of folders, each built aside, made durable and renamed: what exists is complete."""

from __future__ import annotations

import contextlib
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_trainer.checkpoints.disk.durable import TEMPORARY, flush_file
from apollo_trainer.checkpoints.disk.file_ops import FILES, FileOps

_ENTRY = re.compile(r"([0-9]{8})-[0-9a-f]{12}")


class StoreFolder:
    """`<root>/<kind>/<id>/`, where ids are numbered and never used again. Nothing is made yet.

    Args:
        root: the state folder of a model.
        kind: `anchors` or `snapshots`.
    """

    def __init__(self, root: Path, kind: str, ops: FileOps = FILES):
        self.path, self._trash, self._ops = root / kind, root / "trash", ops

    def prepare(self) -> None:
        """Before the first write: makes the folders, and removes what a crash left.

        Half-made entries, and what was thrown away. The folders are not flushed. Raises OSError.
        """
        for folder in (self.path, self._trash):
            _make(self._ops, folder)
        half_made = [n for n in self._ops.names(self.path) if n.startswith(TEMPORARY)]
        thrown = self._ops.names(self._trash)
        for left in (*(self.path / n for n in half_made), *(self._trash / n for n in thrown)):
            self._discard(left)

    def ids(self) -> list[str]:
        """Complete entries, the oldest first."""
        if not self._ops.found(self.path):
            return []
        return [name for name in self._ops.names(self.path) if _ENTRY.fullmatch(name)]

    @contextmanager
    def building(self) -> Iterator[tuple[str, Path]]:
        """A new id, and a folder that `publish` renames; removed again where it was not."""
        numbers = [int(i.split("-")[0]) for i in self.ids()]
        new = f"{max(numbers, default=0) + 1:08d}-{uuid.uuid4().hex[:12]}"
        folder = self.path / f"{TEMPORARY}{new}"
        self._ops.mkdir(folder)
        try:
            yield new, folder
        finally:
            self._discard(folder)

    def publish(self, new: str) -> None:
        """Makes a built entry durable under its id. Raises OSError with no entry left."""
        ops, folder, target = self._ops, self.path / f"{TEMPORARY}{new}", self.path / new
        for name in ops.names(folder):
            flush_file(folder / name, ops)
        ops.sync_folder(folder)
        ops.rename(folder, target)
        try:
            ops.sync_folder(self.path)
        except OSError:
            # It would be there now and perhaps gone after a power failure.
            ops.rename(target, folder)
            raise

    def remove(self, old: str) -> None:
        """Throws an entry away: whole before, gone after, whatever happens between."""
        thrown = self._throw(old)
        self._ops.sync_folder(self.path)
        self._ops.sync_folder(self._trash)
        self._discard(thrown)

    def drop(self, old: str) -> None:
        """The same of one that nothing needs: a power failure may bring it back, or its folder."""
        self._discard(self._throw(old))

    def _throw(self, old: str) -> Path:
        thrown = self._trash / f"{old}-{uuid.uuid4().hex[:8]}"
        self._ops.rename(self.path / old, thrown)
        return thrown

    def _discard(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            self._ops.remove(folder)


def _make(ops: FileOps, folder: Path) -> None:
    if not ops.found(folder):
        _make(ops, folder.parent)
        # Another thread may have come first.
        with contextlib.suppress(FileExistsError):
            ops.mkdir(folder)


def own_bytes(folder: Path, ops: FileOps = FILES) -> int:
    """Bytes of all files below; 0 where there is no folder."""
    found = ops.found(folder)
    if found is None:
        return 0
    if not stat.S_ISDIR(found.st_mode):
        return found.st_size
    return sum(own_bytes(folder / name, ops) for name in ops.names(folder))
