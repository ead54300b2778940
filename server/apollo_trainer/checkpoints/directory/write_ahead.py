"""Sync, rungs 2 and 3, behind a write-ahead record: the intent, which is on disk first.

Rung 2 writes new shards beside the old ones, then the intent, then renames. Rung 3 writes the
changed values into a redo log, then the intent, then the values into the shards: it needs room for
these values only, and a reader that has a shard mapped sees the write. The log holds values and not
differences, so that it may be applied any number of times.

While shards of two generations lie under their names, config.json is aside: a loader that knows
nothing of this fails loudly instead of loading a mix.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from apollo_grpc.errors import DataLoss
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.directory.state_folder import (
    Place,
    SyncMethod,
    announce,
    commit,
    is_untouched,
)
from apollo_trainer.checkpoints.directory.survey import Survey
from apollo_trainer.checkpoints.disk import (
    ShardHeader,
    digest_at,
    flush_file,
    pieces_at,
    read_header,
    write_tensors,
)


def rollforward_sync(survey: Survey) -> Manifest:
    """Rung 2; returns what was committed. Raises OSError; nothing changes before the intent."""
    place = survey.place
    written = [survey.write(shard, place.beside(shard)) for shard in survey.shards]
    place.ops.sync_folder(place.directory)
    manifest = survey.announce(SyncMethod.ROLLFORWARD, written)
    finish_rollforward(place, manifest)
    return manifest


def finish_rollforward(place: Place, manifest: Manifest) -> None:
    """Renames the announced shards and commits, for a sync or a recovery; may be repeated.

    Raises DataLoss where a shard is neither under its name nor beside it, and OSError.
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


def in_place_sync(survey: Survey) -> Manifest:
    """Rung 3; returns what was committed. Raises OSError; nothing changes before the intent."""
    place = survey.place
    changed = {name for shard in survey.shards for name in survey.changed(shard)}
    generation = survey.baseline.generation + 1
    log, beside = place.redo(generation), place.state / "tmp-redo"
    place.ops.remove(beside)
    outlines = {name: survey.baseline.tensors[name].place.outline() for name in changed}
    digests = write_tensors(outlines, beside, None, place.ops, survey.pieces)
    flush_file(beside, place.ops)
    place.ops.rename(beside, log)
    manifest = survey.next_manifest(SyncMethod.IN_PLACE, [])
    tensors = {
        name: replace(t, digest=digests.get(name, t.digest)) for name, t in manifest.tensors.items()
    }
    manifest = replace(manifest, tensors=tensors, written=tuple(survey.shards))
    announce(place, manifest)
    survey.outcome.tensors_changed += len(changed)
    survey.note_rounded(changed)
    survey.outcome.bytes_written += sum(
        tensor.place.size for name, tensor in tensors.items() if name in changed
    )
    return redo(place, manifest)


def redo(place: Place, manifest: Manifest) -> Manifest:
    """Writes the log into the shards, for a sync or a recovery; returns what was committed.

    Raises DataLoss where the log or a shard is not what was announced, with nothing written, and
    OSError.
    """
    log = place.redo(manifest.generation)
    header = _checked_log(place, manifest, log)
    put_config_aside(place)
    with place.ops.opened(log) as source:
        for shard in manifest.written:
            _write(place, manifest, shard, source, header)
    put_config_back(place)
    shards = dict(manifest.shards)
    for shard in manifest.written:
        found = place.ops.stat(place.directory / shard)
        shards[shard] = ShardRecord.of(found, shards[shard].header)
    manifest = replace(manifest, shards=shards)
    commit(place, manifest)
    return manifest


def _checked_log(place: Place, manifest: Manifest, log: Path) -> ShardHeader:
    try:
        header = read_header(place.ops, log)
    except ValueError as error:
        raise _lost(place, f"its log cannot be read: {error}") from error
    with place.ops.opened(log) as file:
        for name, at in header.tensors.items():
            tensor = manifest.tensors.get(name)
            if tensor is None or digest_at(place.ops, file, at) != tensor.digest:
                raise _lost(place, f"{name} in its log is not what was written there")
    for shard in manifest.written:
        found, record = place.ops.found(place.directory / shard), manifest.shards[shard]
        if not found or (found.st_ino, found.st_size) != (record.inode, record.size):
            raise _lost(place, f"{shard} is another file than the one that was written to")
    return header


def _write(place: Place, manifest: Manifest, shard: str, log: int, header: ShardHeader) -> None:
    targets = manifest.tensors_of(shard)
    with place.ops.opened(place.directory / shard, write=True) as file:
        for name in (name for name in header.tensors if name in targets):
            offset = targets[name].place.start
            for piece in pieces_at(place.ops, log, header.tensors[name]):
                place.ops.write_all(file, piece, offset)
                offset += len(piece)
        place.ops.fdatasync(file)


def put_config_aside(place: Place) -> None:
    """Renames config.json durably, so that no loader loads the directory."""
    config = place.directory / "config.json"
    if place.ops.found(config):
        place.ops.rename(config, place.aside)
    place.ops.sync_folder(place.directory)


def put_config_back(place: Place) -> None:
    """Gives config.json its name back, durably; the directory is of one generation again."""
    if place.ops.found(place.aside):
        place.ops.rename(place.aside, place.directory / "config.json")
    place.ops.sync_folder(place.directory)


def perhaps_mixed(place: Place, what: str) -> DataLoss:
    """The refusal to put config.json back over shards that may be of two generations."""
    return DataLoss(
        f"A sync of {place.directory.name} was cut off, and {what}, and config.json is aside "
        f"({place.aside.name}) so that nobody loads a mix. {place.to_begin_anew}",
        reason="SYNC_CANNOT_FINISH",
    )


def _lost(place: Place, what: str) -> DataLoss:
    return DataLoss(
        f"A sync of {place.directory.name} in place was cut off, and cannot be finished: {what}. "
        f"Nothing more was written. {place.to_begin_anew}",
        reason="SYNC_CANNOT_FINISH",
    )
