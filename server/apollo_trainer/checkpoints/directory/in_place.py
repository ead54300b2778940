"""Sync, rung 3: values written into the shards as they lie, behind a redo log of values.

Needs room for the changed tensors only. A reader that has the file mapped sees the write.
The log holds values and not differences: it may be applied any number of times.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from apollo_grpc.errors import DataLoss
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.directory.rollforward import put_config_aside, put_config_back
from apollo_trainer.checkpoints.directory.state_folder import Place, SyncMethod, announce, commit
from apollo_trainer.checkpoints.directory.survey import Survey
from apollo_trainer.checkpoints.disk import (
    PIECE,
    ShardHeader,
    TensorPlace,
    digest_at,
    flush_file,
    read_header,
    write_tensors,
)


def in_place_sync(survey: Survey, shards: list[str]) -> Manifest:
    """Raises OSError; without an intent on disk nothing was changed."""
    place, changed = survey.place, {name for shard in shards for name in survey.changed(shard)}
    generation = survey.baseline.generation + 1
    log, beside = place.redo(generation), place.state / "tmp-redo"
    place.ops.remove(beside)
    outlines = {name: survey.outline(name) for name in changed}
    digests = write_tensors(outlines, beside, None, place.ops, survey.pieces)
    flush_file(beside, place.ops)
    place.ops.rename(beside, log)
    manifest = survey.next_manifest(SyncMethod.IN_PLACE, [])
    tensors = {
        name: replace(t, digest=digests.get(name, t.digest)) for name, t in manifest.tensors.items()
    }
    manifest = replace(manifest, tensors=tensors, written=tuple(shards))
    announce(place, manifest)
    survey.outcome.tensors_changed += len(changed)
    survey.note_rounded(changed)
    survey.outcome.bytes_written += sum(
        t.place.end - t.place.start for name, t in tensors.items() if name in changed
    )
    return redo(place, manifest)


def redo(place: Place, manifest: Manifest) -> Manifest:
    """Writes the log into the shards, by the sync or by a recovery; returns what is committed.

    Raises DataLoss where the log or a shard is not what was announced; nothing is written then.
    """
    log = place.redo(manifest.generation)
    header = _checked_log(place, manifest, log)
    put_config_aside(place)
    with place.ops.opened(log) as source:
        for shard in manifest.written:
            names = [n for n in header.tensors if manifest.tensors[n].shard == shard]
            _write(place, manifest, shard, source, {n: header.tensors[n] for n in names})
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


def _write(
    place: Place, manifest: Manifest, shard: str, log: int, places: dict[str, TensorPlace]
) -> None:
    with place.ops.opened(place.directory / shard, write=True) as file:
        for name, at in places.items():
            target = manifest.tensors[name].place.start
            for start in range(at.start, at.end, PIECE):
                data = place.ops.pread(log, min(PIECE, at.end - start), start)
                place.ops.write_all(file, memoryview(data), target + start - at.start)
        place.ops.fdatasync(file)


def _lost(place: Place, what: str) -> DataLoss:
    return DataLoss(
        f"A sync of {place.directory.name} in place was cut off, and cannot be finished: {what}. "
        f"Nothing more was written. {place.to_begin_anew}",
        reason="SYNC_CANNOT_FINISH",
    )
