"""Sync, rung 1: a folder with the new shards changes places with the model directory.

Whoever opens the directory by its name finds the old one or the new one. Whoever holds it, as a
handle, a bind mount or a working directory, keeps the old one, whole until the sync after the next;
whoever has a file open or mapped keeps that. A loader that opens several shards by their paths, one
after the other, may open the first before an exchange and the second after it: one that must not
holds the directory (`/proc/self/fd/N/` is a path of it), or loads an export.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from apollo_trainer.checkpoints.directory.manifest import Manifest
from apollo_trainer.checkpoints.directory.shard_writer import write_shard
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import Place, SyncMethod, announce, commit
from apollo_trainer.checkpoints.directory.survey import Survey, WrittenShard
from apollo_trainer.checkpoints.disk import CANNOT_EXCHANGE, FileOps


class ExchangeRefused(Exception):
    """This file system or mount cannot do it; nothing of the directory was touched."""


def can_exchange(place: Place) -> bool:
    """Tries it with two empty folders, after a look whether the directory is a mount of its own.

    One that is bound to a second path is not exchanged: that path would stay with the old one.
    """
    ops = place.ops
    if ops.is_bound_elsewhere(place.directory):
        return False
    if ops.stat(place.directory).st_dev != ops.stat(place.state).st_dev:
        return False
    one, other = place.state / "tmp-one", place.state / "tmp-other"
    try:
        for folder in (one, other):
            ops.remove(folder)
            ops.mkdir(folder)
        ops.exchange(one, other)
    except OSError as error:
        if error.errno in CANNOT_EXCHANGE:
            return False
        raise
    finally:
        ops.remove(one)
        ops.remove(other)
    return True


def exchange_sync(
    survey: Survey, shards: list[str], began: Callable[[str], None], spare: Spare
) -> Manifest:
    """Raises ExchangeRefused, or OSError; without an intent on disk nothing was changed."""
    place = survey.place
    spare.open(place, survey.baseline.generation, shards)
    written = list[WrittenShard]()
    for shard in shards:
        began(shard)
        written.append(write_shard(survey, shard, place.next_folder / shard, spare))
    copy_names(place.ops, place.directory, place.next_folder, skip=set(shards))
    manifest = survey.next_manifest(SyncMethod.EXCHANGE, written)
    # The last moment at which all is as it was.
    began(place.intent_path.name)
    announce(place, manifest)
    try:
        place.ops.exchange(place.directory, place.next_folder)
    except OSError as error:
        if error.errno in CANNOT_EXCHANGE:
            raise ExchangeRefused from error
        raise
    finish_exchange(place, manifest)
    spare.keep(place, survey.baseline, shards)
    return manifest


def finish_exchange(place: Place, manifest: Manifest) -> None:
    """After the exchange, by the sync or by a recovery."""
    ops, old = place.ops, place.before(manifest.generation - 1)
    ops.sync_folder(place.directory.parent)
    ops.sync_folder(place.state)
    if ops.found(place.next_folder):
        # Of a numbering that began anew.
        ops.remove(old)
        ops.rename(place.next_folder, old)
    commit(place, manifest)


def copy_names(ops: FileOps, source: Path, target: Path, skip: set[str] | None = None) -> None:
    """Gives all files of a folder a second name in another one, whose names are then on disk."""
    for name in ops.names(source):
        old, new = source / name, target / name
        mode = ops.stat(old).st_mode
        if skip and name in skip:
            continue
        if stat.S_ISDIR(mode):
            ops.mkdir(new)
            copy_names(ops, old, new)
        elif stat.S_ISLNK(mode):
            ops.symlink(ops.read_link(old), new)
        else:
            _link(ops, old, new)
    ops.copy_attributes(source, target)
    ops.sync_folder(target)


def _link(ops: FileOps, old: Path, new: Path) -> None:
    try:
        ops.link(old, new)
    except OSError as error:
        # The kernel protects the files of others, and some file systems know no links.
        if error.errno in CANNOT_EXCHANGE:
            raise ExchangeRefused from error
        raise
