"""Settles what a crash left of a sync: the directory is of the old generation or of the new one.

May be repeated, and may itself be cut off anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from apollo_grpc.errors import ApolloError, FailedPrecondition
from apollo_trainer.checkpoints.directory.exchange import finish_exchange
from apollo_trainer.checkpoints.directory.in_place import redo
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.directory.rollforward import (
    finish_rollforward,
    perhaps_mixed,
    put_config_back,
)
from apollo_trainer.checkpoints.directory.state_folder import (
    Place,
    SyncMethod,
    held,
    read_manifest,
    refreshed,
)
from apollo_trainer.checkpoints.disk import TEMPORARY, remove_unfinished

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
    changed = _others(place, baseline.shards) or [place.directory.name]
    return _edited(changed, "the last sync", f"remove {place.manifest_path}")


def require_as_seen(place: Place, seen: Mapping[str, ShardRecord]) -> None:
    """Raises FailedPrecondition where a directory without a manifest holds other files than seen.

    Args:
        seen: when the engine's weights were known to be those of the directory.
    """
    if changed := _others(place, seen):
        raise _edited(changed, "the training server was attached", "restart the training server")


def _others(place: Place, shards: Mapping[str, ShardRecord]) -> list[str]:
    """Names of shards that came, went, or are other files than these."""
    loaded = set(place.shard_names())
    return [
        name
        for name in sorted({*shards, *loaded})
        if name not in shards
        or name not in loaded
        or not shards[name].is_at(place.ops.found(place.directory / name))
    ]


def _edited(changed: list[str], since: str, to_insist: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{', '.join(changed)} was changed by somebody else since {since}; nothing was written, "
        "and the live weights were not touched. If these files are wanted, `apollo checkpoint "
        "export FOLDER` keeps what was learned, then restart vLLM to serve them; if the live "
        f"weights are to replace them, {to_insist} and sync again.",
        reason="DIRECTORY_EDITED",
    )
