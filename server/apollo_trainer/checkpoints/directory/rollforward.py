"""Sync, rung 2: new shards beside the old ones, a commit record, renames.

While shards of two generations lie under their names, config.json is aside: a loader that knows
nothing of this fails loudly instead of loading a mix.
"""

from __future__ import annotations

from collections.abc import Callable

from apollo_grpc.errors import DataLoss
from apollo_trainer.checkpoints.directory.manifest import Manifest
from apollo_trainer.checkpoints.directory.shard_writer import write_shard
from apollo_trainer.checkpoints.directory.state_folder import (
    Place,
    SyncMethod,
    announce,
    commit,
    is_untouched,
)
from apollo_trainer.checkpoints.directory.survey import Survey, WrittenShard


def rollforward_sync(survey: Survey, shards: list[str], began: Callable[[str], None]) -> Manifest:
    """Raises OSError; without an intent on disk nothing was changed."""
    place, written = survey.place, list[WrittenShard]()
    for shard in shards:
        began(shard)
        written.append(write_shard(survey, shard, place.beside(shard)))
    place.ops.sync_folder(place.directory)
    manifest = survey.next_manifest(SyncMethod.ROLLFORWARD, written)
    # The last moment at which all is as it was.
    began(place.intent_path.name)
    announce(place, manifest)
    finish_rollforward(place, manifest)
    return manifest


def finish_rollforward(place: Place, manifest: Manifest) -> None:
    """From the commit record on, by the sync or by a recovery; may be repeated.

    Raises DataLoss where a shard is neither under its name nor beside it.
    """
    put_config_aside(place)
    for shard in manifest.written:
        record, beside = manifest.shards[shard], place.beside(shard)
        if record.is_at(place.ops.found(beside)):
            place.ops.rename(beside, place.directory / shard)
    if not is_untouched(place, manifest):
        raise perhaps_mixed(
            place,
            "a shard that it had written has since been changed or taken away. Nothing more was "
            "written",
        )
    place.ops.sync_folder(place.directory)
    put_config_back(place)
    commit(place, manifest)


def perhaps_mixed(place: Place, what: str) -> DataLoss:
    """The refusal to put config.json back over shards that may be of two generations."""
    return DataLoss(
        f"A sync of {place.directory.name} was cut off, and {what}, and config.json is aside "
        f"({place.aside.name}) so that nobody loads a mix. {place.to_begin_anew}",
        reason="SYNC_CANNOT_FINISH",
    )


def put_config_aside(place: Place) -> None:
    """From here on no loader that reads config.json loads the directory."""
    config = place.directory / "config.json"
    if place.ops.found(config):
        place.ops.rename(config, place.aside)
    place.ops.sync_folder(place.directory)


def put_config_back(place: Place) -> None:
    """The directory is of one generation again."""
    if place.ops.found(place.aside):
        place.ops.rename(place.aside, place.directory / "config.json")
    place.ops.sync_folder(place.directory)
