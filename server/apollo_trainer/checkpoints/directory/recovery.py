"""Settles what a crash left of a sync: the directory is of the old generation or of the new one.

May be repeated, and may itself be cut off anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from apollo_grpc.errors import ApolloError, FailedPrecondition
from apollo_trainer.checkpoints.directory.exchange import finish_exchange
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.directory.new_directory import remove_unfinished
from apollo_trainer.checkpoints.directory.state_folder import (
    Place,
    SyncMethod,
    changed_shards,
    held,
    read_manifest,
    refreshed,
)
from apollo_trainer.checkpoints.directory.write_ahead import (
    finish_rollforward,
    perhaps_mixed,
    put_config_back,
    redo,
)
from apollo_trainer.checkpoints.disk import TEMPORARY

log = logging.getLogger(__name__)


def settle_directory(place: Place) -> None:
    """`recover_directory` when a server starts; logs what failed, which the next sync raises again.

    Without it a directory whose config.json is aside would stay so until the next sync.
    """
    try:
        recover_directory(place)
    except (ApolloError, OSError) as error:
        log.error("%s was not settled: %s", place.directory, error)


def recover_directory(place: Place) -> Manifest | None:
    """Takes the lock and recovers the directory; returns the manifest, None where there is none.

    Removes what killed exports and copies left beside the directory. Makes no state folder. Raises
    as `recover` and `held`.
    """
    remove_unfinished(place.directory.parent, place.ops)
    if not place.ops.found(place.state):
        return None
    with held(place):
        return recover(place)


def recover(place: Place) -> Manifest | None:
    """Finishes or drops a sync that was cut off; returns the manifest that holds now, if any.

    The caller holds the lock. Keeps the earlier directories. Raises FailedPrecondition where the
    directory was edited, DataLoss where the sync cannot be finished: both leave all as it is.
    Raises OSError.
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
    elif intent.method != SyncMethod.IN_PLACE and (reached := refreshed(place, intent)):
        finish_exchange(place, reached)
    elif baseline and not refreshed(place, baseline):
        raise edited(place, baseline)


def _remove_leftovers(place: Place) -> None:
    """Removes what was never announced, or is done with."""
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
    changed = changed_shards(place, baseline.shards) or [place.directory.name]
    return _edited(changed, "the last sync", f"remove {place.manifest_path}")


def require_as_seen(place: Place, seen: Mapping[str, ShardRecord]) -> None:
    """Raises FailedPrecondition where a directory without a manifest holds other files than seen.

    Args:
        seen: when the engine's weights were known to be those of the directory.
    """
    if changed := changed_shards(place, seen):
        raise _edited(changed, "the training server was attached", "restart the training server")


def _edited(changed: list[str], since: str, to_insist: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{', '.join(changed)} was changed by somebody else since {since}; nothing was written, "
        "and the live weights were not touched. If these files are wanted, `apollo checkpoint "
        "export FOLDER` keeps what was learned, then restart vLLM to serve them; if the live "
        f"weights are to replace them, {to_insist} and sync again.",
        reason="DIRECTORY_EDITED",
    )
