"""The earlier directories: kept whole for one sync more, then their shards are written over.

An exchange leaves the old directory behind. Processes may still have it open, mounted or as their
working directory, so that it stays as it was until the sync after the next. That sync removes its
config first, so that no loader takes the rest for a model. Then it moves the shards into the folder
that it builds: to write over a shard costs only what changed since, a new file costs all of it. It
takes a shard only when the kernel says that no process has it open or mapped.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from apollo_grpc.errors import Unavailable
from apollo_trainer.checkpoints.directory.manifest import Manifest
from apollo_trainer.checkpoints.directory.state_folder import Place, held

Digests = dict[str, str]
# What a loader reads first: without it the folder is none of a model.
_READ_FIRST = ("config.json", "params.json", "model.safetensors.index.json")


class Spare:
    """The earlier directories of one model, and what this process knows of their shards.

    After a crash nobody knows that any more, so that no order of writes has to be kept for it.

    Args:
        keeps: False: the old directory is removed after every exchange, whoever holds it.
    """

    def __init__(self, *, keeps: bool = True):
        self._keeps = keeps
        self._place: Place | None = None
        self._left: dict[int, Manifest] = {}
        # By shard: of the generation that the spare shard was of.
        self._taken: dict[str, Manifest] = {}

    def open(self, place: Place, generation: int, shards: list[str]) -> None:
        """Makes `place.next_folder`, and moves spare ones of these shards into it.

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
        """Digests of the tensors of a spare shard in the opened folder; None where there is none.

        Args:
            header: the digest of the header that the new shard is to have.
        """
        of = self._taken.pop(shard, None)
        if of is None or of.shards[shard].header != header:
            return None
        return {name: tensor.digest for name, tensor in of.tensors_of(shard).items()}

    def keep(self, place: Place, old: Manifest, replaced: list[str]) -> None:
        """After an exchange: keeps the old directory, and removes the oldest ones for room.

        There must be room for the replaced shards once more. Ignores errors of the disk: the sync
        is done.
        """
        self._left[old.generation] = old
        size = sum(old.shards[name].size for name in replaced)
        with contextlib.suppress(OSError):
            for number in place.left_before():
                if self._keeps and place.ops.room(place.state) >= size:
                    return
                self._dismantle(place, number, [])

    def give_way(self, place: Place) -> bool:
        """Removes all earlier directories, for room; returns whether there was one."""
        numbers = place.left_before()
        for number in numbers:
            self._dismantle(place, number, [])
        return bool(numbers)

    def remove(self) -> None:
        """At the end: removes all but the newest, unless another process holds the lock."""
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
                self._take_out(place, folder, known, shard)
        place.ops.remove(folder)

    def _take_out(self, place: Place, folder: Path, old: Manifest, shard: str) -> None:
        ops, target = place.ops, place.next_folder / shard
        found = ops.found(folder / shard)
        if found is None or found.st_nlink > 1 or not old.shards[shard].is_at(found):
            return
        # A rename would have to wait for the old folder to be flushed too.
        ops.link(folder / shard, target)
        # From here on no path leads to it for whoever holds the old folder.
        ops.unlink(folder / shard)
        with ops.opened(target, write=True) as file:
            ours = ops.stat(target).st_nlink == 1 and ops.is_open_here_alone(file)
        if ours:
            self._taken[shard] = old
        else:
            ops.remove(target)
