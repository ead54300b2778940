"""Sync, rung 1: a folder with the new shards changes places with the model directory.

A process that opens the directory by its name finds the old one or the new one. One that holds it,
as a handle, a bind mount or a working directory, keeps the old one, whole until the sync after the
next. One that has a file open or mapped keeps that file. A loader that opens several shards by
their paths may open the first before an exchange and the second after it. To avoid that, it opens
the directory and uses the paths below `/proc/self/fd/N/`, or loads an export.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path

from apollo_trainer.checkpoints.directory.manifest import Manifest
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import Place, SyncMethod, commit
from apollo_trainer.checkpoints.directory.survey import Survey
from apollo_trainer.checkpoints.disk import CANNOT_EXCHANGE, FileOps


class ExchangeRefused(Exception):
    """This file system or mount cannot do it; nothing of the directory was touched."""


@contextlib.contextmanager
def _or_refused() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in CANNOT_EXCHANGE:
            raise ExchangeRefused from error
        raise


def can_exchange(place: Place) -> bool:
    """Whether the directory can be exchanged here: tries it with two empty folders.

    False for a directory that is bound to a second path, which would keep the old one. Raises
    OSError.
    """
    ops = place.ops
    if ops.is_bound_elsewhere(place.directory):
        return False
    if ops.stat(place.directory).st_dev != ops.stat(place.state).st_dev:
        return False
    one, other = place.state / "tmp-one", place.state / "tmp-other"
    try:
        with _or_refused():
            for folder in (one, other):
                ops.remove(folder)
                ops.mkdir(folder)
            ops.exchange(one, other)
    except ExchangeRefused:
        return False
    finally:
        ops.remove(one)
        ops.remove(other)
    return True


def exchange_sync(survey: Survey, spare: Spare) -> Manifest:
    """Rung 1; returns what was committed.

    Raises ExchangeRefused with the directory as it was, and OSError; nothing changes before the
    intent.
    """
    place, ops = survey.place, survey.place.ops
    spare.open(place, survey.baseline.generation, survey.shards)
    written = [survey.write(s, place.next_folder / s, spare) for s in survey.shards]
    copy_names(ops, place.directory, place.next_folder, skip=set(survey.shards))
    manifest = survey.announce(SyncMethod.EXCHANGE, written)
    with _or_refused():
        ops.exchange(place.directory, place.next_folder)
    finish_exchange(place, manifest)
    spare.keep(place, survey.baseline, survey.shards)
    return manifest


def finish_exchange(place: Place, manifest: Manifest) -> None:
    """Commits after the exchange, for a sync or a recovery. Raises OSError."""
    ops, old = place.ops, place.before(manifest.generation - 1)
    ops.sync_folder(place.directory.parent)
    ops.sync_folder(place.state)
    if ops.found(place.next_folder):
        # Of a numbering that began anew.
        ops.remove(old)
        ops.rename(place.next_folder, old)
    commit(place, manifest)


def copy_names(ops: FileOps, source: Path, target: Path, skip: set[str] | None = None) -> None:
    """Links all files of a folder into another one, and flushes that. Raises ExchangeRefused."""
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
            # The kernel protects the files of others, and some file systems know no links.
            with _or_refused():
                ops.link(old, new)
    ops.copy_attributes(source, target)
    ops.sync_folder(target)
