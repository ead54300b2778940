"""A folder of folders, each built under another name, flushed and renamed once complete."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_trainer.checkpoints.disk.durable import TEMPORARY, flush_file, staged
from apollo_trainer.checkpoints.disk.file_ops import FILES, FileOps

_ENTRY = re.compile(r"([0-9]{8})-[0-9a-f]{12}")


class StoreFolder:
    """`<root>/<kind>/<id>/`; ids are numbered and never used again. `prepare` makes the folders.

    Args:
        root: the state folder of a model.
        kind: `anchors` or `snapshots`.
    """

    def __init__(self, root: Path, kind: str, ops: FileOps = FILES):
        self.path, self._trash, self._ops = root / kind, root / "trash", ops

    def prepare(self) -> None:
        """Before the first write: makes the folders, and removes what a crash left half-made.

        Does not flush the folders. Raises OSError.
        """
        for folder in (self.path, self._trash):
            self._ops.make_folders(folder)
        half_made = [self.path / n for n in self._ops.names(self.path) if n.startswith(TEMPORARY)]
        for left in (*half_made, *(self._trash / name for name in self._ops.names(self._trash))):
            self._discard(left)

    def ids(self) -> list[str]:
        """Complete entries, the oldest first. Raises OSError."""
        names = self._ops.names(self.path) if self._ops.found(self.path) else []
        return [name for name in names if _ENTRY.fullmatch(name)]

    @contextmanager
    def building(self) -> Iterator[tuple[str, Path]]:
        """A new id and its folder, for `publish`; removes the folder when that did not happen."""
        numbers = [int(i.split("-")[0]) for i in self.ids()]
        new = f"{max(numbers, default=0) + 1:08d}-{secrets.token_hex(6)}"
        with staged(self.path / f"{TEMPORARY}{new}", self._ops) as folder:
            self._ops.mkdir(folder)
            yield new, folder

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
        """Deletes an entry durably: a crash leaves it whole or gone. Raises OSError."""
        thrown = self._throw(old)
        self._ops.sync_folder(self.path)
        self._ops.sync_folder(self._trash)
        self._discard(thrown)

    def drop(self, old: str) -> None:
        """Deletes an entry that nothing needs: a power failure may bring it back."""
        self._discard(self._throw(old))

    def _throw(self, old: str) -> Path:
        thrown = self._trash / f"{old}-{secrets.token_hex(4)}"
        self._ops.rename(self.path / old, thrown)
        return thrown

    def _discard(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            self._ops.remove(folder)


def own_bytes(folder: Path, ops: FileOps = FILES) -> int:
    """Bytes of all files below; 0 where there is no folder."""
    if ops.is_folder(folder):
        return sum(own_bytes(folder / name, ops) for name in ops.names(folder))
    found = ops.found(folder)
    return found.st_size if found else 0
