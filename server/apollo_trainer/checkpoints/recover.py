"""Settles what a crash left of a sync: the directory is of the old generation or of the new one.

May be repeated, and may itself be cut off anywhere.
"""

from __future__ import annotations

import logging

from apollo_grpc.errors import ApolloError, FailedPrecondition
from apollo_trainer.checkpoints.durable_write import TEMPORARY
from apollo_trainer.checkpoints.exchange import finish_exchange
from apollo_trainer.checkpoints.in_place import redo
from apollo_trainer.checkpoints.manifest import Manifest
from apollo_trainer.checkpoints.new_folder import remove_unfinished
from apollo_trainer.checkpoints.rollforward import (
    finish_rollforward,
    perhaps_mixed,
    put_config_back,
)
from apollo_trainer.checkpoints.state_folder import (
    Place,
    SyncMethod,
    held,
    read_manifest,
    refreshed,
)

log = logging.getLogger(__name__)


def settle_directory(place: Place) -> None:
    """At the start: `recover`, where there is a state folder; what it cannot do, a sync will tell.

    Removes exports and copies that were begun beside the directory by a process that is no more.

    Without it a directory whose config.json is aside would stay so until the next sync.
    """
    if place.ops.found(place.directory.parent):
        remove_unfinished(place.directory.parent, place.ops)
    if place.ops.found(place.state) is None:
        return
    try:
        with held(place):
            recover(place)
    except (ApolloError, OSError) as error:
        log.error("%s was not settled: %s", place.directory, error)


def recover(place: Place) -> Manifest | None:
    """Finishes or drops what was begun; returns the manifest that holds now, if there is one.

    The caller holds the lock. Directories of generations before stay. Raises FailedPrecondition
    where the directory was edited, DataLoss where a sync cannot be finished; both leave all as it
    is. Raises OSError.
    """
    baseline, intent = read_manifest(place), read_manifest(place, place.intent_path)
    if intent and intent.generation > (baseline.generation if baseline else 0):
        _settle(place, baseline, intent)
        baseline = read_manifest(place)
    if place.ops.found(place.aside) and not (baseline and refreshed(place, baseline)):
        raise perhaps_mixed(
            place,
            "what it had announced is gone: nobody knows of which generation its shards are. "
            "Nothing was written",
        )
    _remove_leftovers(place)
    return baseline


def _settle(place: Place, baseline: Manifest | None, intent: Manifest) -> None:
    if intent.method == SyncMethod.ROLLFORWARD:
        finish_rollforward(place, intent)
    elif intent.method == SyncMethod.IN_PLACE and place.ops.found(place.redo(intent.generation)):
        redo(place, intent)
    # Nothing is written in place before both the log and the intent are on disk.
    elif intent.method != SyncMethod.IN_PLACE and (held_now := refreshed(place, intent)):
        finish_exchange(place, held_now)
    elif baseline and not refreshed(place, baseline):
        raise edited(place, baseline)


def _remove_leftovers(place: Place) -> None:
    """What no intent speaks of: it was never announced, or is done with."""
    ops = place.ops
    for name in ops.names(place.state):
        if name.startswith((TEMPORARY, "redo-")):
            ops.remove(place.state / name)
    for name in ops.names(place.directory):
        if name.startswith(".") and name.endswith(".apollo-next"):
            ops.remove(place.directory / name)
    if ops.found(place.aside):
        put_config_back(place)
    if ops.found(place.intent_path):
        ops.remove(place.intent_path)
        # Else a power failure could bring it back beside what is built next.
        ops.sync_folder(place.state)


def edited(place: Place, baseline: Manifest) -> FailedPrecondition:
    """The refusal of a directory that somebody else has written to."""
    loaded = set(place.shard_names())
    changed = [
        name
        for name in sorted({*baseline.shards, *loaded})
        if name not in baseline.shards
        or name not in loaded
        or not baseline.shards[name].is_at(place.ops.found(place.directory / name))
    ]
    return FailedPrecondition(
        f"{', '.join(changed) or place.directory.name} was changed by somebody else since the last "
        "sync; nothing was written, and the live weights were not touched. If these files are "
        "wanted, `apollo checkpoint export FOLDER` keeps what was learned, then restart vLLM to "
        "serve them; if the live weights are to replace them, remove "
        f"{place.manifest_path} and sync again.",
        reason="DIRECTORY_EDITED",
    )
