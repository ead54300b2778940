"""The shards of the generation before the last one, written over instead of new files.

An exchange leaves the old directory behind. To write over its shards costs what changed in two
generations; new files cost all of them. Nobody may still read such a shard: its name is gone, and
the kernel is asked whether a process has it open or mapped.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from apollo_grpc.errors import Unavailable
from apollo_trainer.checkpoints.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.state_folder import Place, held

Digests = dict[str, str]


@dataclass(frozen=True)
class _Shard:
    record: ShardRecord
    digests: Digests


class Spare:
    """What is in the folder that was exchanged; known to this process alone.

    Whoever comes after a crash takes it for garbage: no order of writes has to be kept for it.

    Args:
        keeps: False: the old directory is removed after every exchange.
    """

    def __init__(self, *, keeps: bool = True):
        self._keeps = keeps
        self._place: Place | None = None
        self._shards: dict[str, _Shard] = {}

    def is_in(self, folder: Path) -> bool:
        """Whether this is the folder."""
        return self._place is not None and self._place.next_folder == folder

    def keep(self, place: Place, old: Manifest, replaced: list[str]) -> None:
        """After an exchange: of the old directory the shards stay that were replaced.

        Nothing stays where the disk would have no room for as much once more. An error of the disk
        is none of the sync, which is done.
        """
        with contextlib.suppress(OSError):
            self.forget()
            size = sum(old.shards[name].size for name in replaced)
            if not self._keeps or place.ops.room(place.state) < size:
                place.ops.remove(place.next_folder)
                return
            for name in place.ops.names(place.next_folder):
                if name not in replaced:
                    place.ops.remove(place.next_folder / name)
            self._place = place
            self._shards = {name: _known(old, name) for name in replaced}

    def open(self, place: Place, shards: list[str]) -> None:
        """Makes `place.next_folder` one that holds of these shards what is spare, or nothing."""
        if not self.is_in(place.next_folder) or not place.ops.found(place.next_folder):
            self.forget()
            place.ops.remove(place.next_folder)
            place.ops.mkdir(place.next_folder)
        for name in place.ops.names(place.next_folder):
            if name not in shards or not self._is_ours(place, name):
                self._shards.pop(name, None)
                place.ops.remove(place.next_folder / name)
        self._place = None

    def take(self, shard: str, header: str) -> Digests | None:
        """Digests of a shard's tensors in the opened folder; None where there is none to take.

        Args:
            header: the digest of the header that the new shard is to have.
        """
        found = self._shards.pop(shard, None)
        return found.digests if found and found.record.header == header else None

    def remove(self) -> None:
        """Frees the disk, unless another process is at work in the folder by now."""
        if self._place is not None:
            with contextlib.suppress(OSError, Unavailable), held(self._place):
                self._place.ops.remove(self._place.next_folder)
        self.forget()

    def forget(self) -> None:
        """Nothing is known any more of what is there."""
        self._place, self._shards = None, {}

    def _is_ours(self, place: Place, name: str) -> bool:
        shard, path = self._shards.get(name), place.next_folder / name
        found = place.ops.found(path)
        if not shard or not shard.record.is_at(found) or not found or found.st_nlink > 1:
            return False
        with place.ops.opened(path, write=True) as file:
            return place.ops.is_open_here_alone(file)


def _known(old: Manifest, shard: str) -> _Shard:
    tensors = {name: t.digest for name, t in old.tensors.items() if t.shard == shard}
    return _Shard(old.shards[shard], tensors)
