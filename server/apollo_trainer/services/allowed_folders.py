"""Where on the server's machine callers may have folders made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from apollo_grpc.errors import InvalidArgument
from apollo_trainer.config import roots_of
from apollo_trainer.engine import ModelOwner


class AllowedFolders:
    """Any for callers on a unix socket, who are the server's own user; below roots for others.

    Args:
        roots: as the setting `export_roots` has them; without any, the folder that the model
            directory lies in.
    """

    def __init__(self, owner: ModelOwner, roots: str):
        self._owner, self._roots = owner, roots_of(roots)

    async def allowed(self, path: Path, context: Any) -> Path:
        """The path, for callers over TCP with every link resolved.

        Raises InvalidArgument where it lies outside, Unavailable where no engine is attached that
        would say where the model is.
        """
        if str(context.peer()).startswith("unix:"):
            return path
        roots = self._roots or (Path(self._owner.session().attachment.directory).parent,)
        return await asyncio.to_thread(_below, path, roots)


def _below(path: Path, roots: tuple[Path, ...]) -> Path:
    try:
        # What is not there yet has no links; what is there must not lead out.
        found = path.resolve()
        inside = any(root.resolve() in found.parents for root in roots)
    except (OSError, RuntimeError):
        inside = False
    if inside:
        return found
    shown = ", ".join(map(str, roots))
    raise InvalidArgument.at(
        "directory",
        f"must lie below {shown}, links resolved; the setting export_roots of the server names "
        "other folders. Nothing was written",
        reason="PATH_OUTSIDE_ROOTS",
    )
