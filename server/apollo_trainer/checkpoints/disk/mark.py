"""A small file that says what is at work, until that has ended; a killed server leaves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apollo_trainer.checkpoints.disk.durable import durable_bytes, flush_folder


class Mark:
    """One file of JSON. What is written or removed is on disk when the call returns."""

    def __init__(self, path: Path):
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return self._path.exists()

    def write(self, contents: dict[str, Any]) -> None:
        """Replaces it; makes its folder, this user's alone. Raises OSError."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable_bytes(self._path, json.dumps(contents).encode())

    def read(self) -> dict[str, Any]:
        """What it says; nothing where it is missing or no JSON object."""
        try:
            contents = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return contents if isinstance(contents, dict) else {}

    def remove(self) -> None:
        """Removes it where it is. Raises OSError."""
        if self.exists:
            self._path.unlink()
            flush_folder(self._path.parent)
