"""The directories of the generations before: whole for whoever holds one, then spare shards.

An exchange leaves the old directory behind. Who has it open, mounted or as working directory goes
on in it, so that it stays as it was until the sync after the next. Then its config goes first, so
that no loader takes the rest for a model, and its shards go to the folder that is being built: to
write over one costs what changed since, a new file all of it. Nobody may still read such a shard:
its name is gone, and the kernel is asked whether a process has it open or mapped.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from apollo_grpc.errors import Unavailable
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.directory.state_folder import Place, held
from apollo_trainer.checkpoints.disk import FileOps

Digests = dict[str, str]
# What a loader reads first: without it the folder is none of a model.
_READ_FIRST = ("config.json", "params.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class _Shard:
    record: ShardRecord
    digests: Digests


class Spare:
    """What this process knows of the folders that it left; another one finds folders only.

    Whoever comes after a crash has no use for the shards: no order of writes has to be kept.

    Args:
        keeps: False: the old directory is removed after every exchange, whoever holds it.
    """

    def __init__(self, *, keeps: bool = True):
        self._keeps = keeps
        self._place: Place | None = None
        self._left: dict[int, Manifest] = {}
        self._taken: dict[str, _Shard] = {}

    def open(self, place: Place, generation: int, shards: list[str]) -> None:
        """Makes `place.next_folder`, with those of these shards in it that are spare.

        Args:
            generation: of the directory now.
        """
        place.ops.remove(place.next_folder)
        place.ops.mkdir(place.next_folder)
        self._place, self._taken = place, {}
        numbers = place.left_before()
        newest = max((n for n in numbers if n < generation), default=-1) if self._keeps else -1
        for number in numbers:
            if number != newest:
                self._dismantle(place, number, shards)

    def take(self, shard: str, header: str) -> Digests | None:
        """Digests of a shard's tensors in the opened folder; None where there is none to take.

        Args:
            header: the digest of the header that the new shard is to have.
        """
        found = self._taken.pop(shard, None)
        return found.digests if found and found.record.header == header else None

    def keep(self, place: Place, old: Manifest, replaced: list[str]) -> None:
        """After an exchange: the old directory stays, where the disk has room for it.

        The oldest goes while there is no room for as much once more. An error of the disk is none
        of the sync, which is done.
        """
        self._left[old.generation] = old
        size = sum(old.shards[name].size for name in replaced)
        with contextlib.suppress(OSError):
            for number in place.left_before():
                if self._keeps and place.ops.room(place.state) >= size:
                    return
                self._dismantle(place, number, [])

    def give_way(self, place: Place) -> bool:
        """Frees all that is kept, for a disk that is full; returns whether there was anything."""
        numbers = place.left_before()
        for number in numbers:
            self._dismantle(place, number, [])
        return bool(numbers)

    def remove(self) -> None:
        """At the end: all but the generation before, unless another process is at work by now."""
        if self._place is not None:
            with contextlib.suppress(OSError, Unavailable), held(self._place):
                for number in self._place.left_before()[:-1]:
                    self._dismantle(self._place, number, [])
        self._place, self._left = None, {}

    def _dismantle(self, place: Place, number: int, shards: list[str]) -> None:
        folder, known = place.before(number), self._left.pop(number, None)
        for name in _READ_FIRST:
            place.ops.remove(folder / name)
        for shard in shards:
            if known and shard in known.shards and shard not in self._taken:
                self._take_out(place, folder, _known(known, shard), shard)
        place.ops.remove(folder)

    def _take_out(self, place: Place, folder: Path, spare: _Shard, shard: str) -> None:
        ops, target = place.ops, place.next_folder / shard
        found = ops.found(folder / shard)
        if found is None or found.st_nlink > 1 or not spare.record.is_at(found):
            return
        # A rename would have to wait for the old folder to be flushed too.
        ops.link(folder / shard, target)
        # From here on no path leads to it for whoever holds the old folder.
        ops.unlink(folder / shard)
        if _is_ours_alone(ops, target):
            self._taken[shard] = spare
        else:
            ops.remove(target)


def _is_ours_alone(ops: FileOps, path: Path) -> bool:
    with ops.opened(path, write=True) as file:
        return ops.stat(path).st_nlink == 1 and ops.is_open_here_alone(file)


def _known(old: Manifest, shard: str) -> _Shard:
    tensors = {name: t.digest for name, t in old.tensors.items() if t.shard == shard}
    return _Shard(old.shards[shard], tensors)
