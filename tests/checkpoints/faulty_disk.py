"""The product's `FileOps` on a real disk, of which one call fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from apollo_trainer.checkpoints.disk.file_ops import FileOps

CALLS = (
    "create", "pwrite", "fsync", "fdatasync", "sync_folder", "rename", "exchange", "link", "unlink",
    "mkdir", "rmdir", "open", "pread", "stat", "names", "copy_attributes", "rename_new",
)  # fmt: skip
SHORT_WRITE = "short write"


class FaultyFiles(FileOps):
    """Fails in its `number`th call; a short write takes one byte.

    Attributes:
        calls: names of all calls until now.
        failed: the call that did.
    """

    def __init__(self, number: int, fault: str):
        self.number, self.fault = number, fault
        self.calls: list[str] = []
        self.failed = ""

    def fails(self, name: str) -> bool:
        """Counts a call."""
        self.calls.append(name)
        if len(self.calls) - 1 != self.number:
            return False
        self.failed = name
        return True

    def raise_fault(self, where: object) -> None:
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number), str(where))


def _faulty(name: str) -> Any:
    real = getattr(FileOps, name)

    def call(self: FaultyFiles, *arguments: Any, **options: Any) -> Any:
        if self.fails(name):
            if self.fault != SHORT_WRITE:
                self.raise_fault(arguments[0])
            elif name == "pwrite":
                file, data, offset = arguments
                return real(self, file, data[:1], offset)
        return real(self, *arguments, **options)

    return call


for _name in CALLS:
    setattr(FaultyFiles, _name, _faulty(_name))


def tree(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
