"""Writes a shard anew from the live weights, and what only the old file holds from there."""

from __future__ import annotations

import contextlib
from pathlib import Path

from apollo_trainer.checkpoints.directory.manifest import ShardRecord, TensorRecord
from apollo_trainer.checkpoints.directory.spare import Digests, Spare
from apollo_trainer.checkpoints.directory.survey import Survey, WrittenShard
from apollo_trainer.checkpoints.disk import ShardHeader, digest_of, read_header, write_pieces


def write_shard(
    survey: Survey, shard: str, target: Path, spare: Spare | None = None
) -> WrittenShard:
    """Writes `target`, and flushes it; its name is on disk after its folder's fsync only.

    Args:
        spare: may have a shard at `target` already, to be written over.

    Raises OSError: the new file must then be given up.
    """
    ops, path = survey.place.ops, survey.place.directory / shard
    header = read_header(ops, path)
    holds = spare.take(shard, digest_of(header.raw)) if spare else None
    file = _new_file(survey, target) if holds is None else ops.open(target, write=True)
    try:
        if holds is None:
            holds = _begun(survey, path, header, file)
        digests = _write(survey, header, file, holds)
        ops.copy_attributes(path, target)
        ops.fsync(file)
    finally:
        ops.close(file)
    tensors = {
        name: TensorRecord(shard, place, survey.version(name), digests[name])
        for name, place in header.tensors.items()
    }
    changed = [name for name in tensors if survey.baseline.tensors[name].digest != digests[name]]
    survey.outcome.tensors_changed += len(changed)
    survey.note_rounded(changed)
    return WrittenShard(shard, ShardRecord.of(ops.stat(target), digest_of(header.raw)), tensors)


def _new_file(survey: Survey, target: Path) -> int:
    survey.place.ops.remove(target)
    return survey.place.ops.create(target)


def _begun(survey: Survey, path: Path, header: ShardHeader, file: int) -> Digests:
    """Digests of the tensors that an empty file holds now: with its header, or as a clone."""
    moved = all(survey.may_have_moved(name) for name in header.tensors)
    if not moved and _cloned(survey, path, file):
        return {name: survey.baseline.tensors[name].digest for name in header.tensors}
    survey.place.ops.write_all(file, memoryview(header.raw), 0)
    survey.outcome.bytes_written += len(header.raw)
    return {}


def _cloned(survey: Survey, path: Path, file: int) -> bool:
    """Whether the new file shares the blocks of the old one, where the file system can do that."""
    ops = survey.place.ops
    with contextlib.suppress(OSError), ops.opened(path) as source:
        ops.clone(source, file)
        return True
    return False


def _write(survey: Survey, header: ShardHeader, file: int, holds: Digests) -> Digests:
    """Writes what the file does not hold yet, in its order; returns the digests of all."""
    digests = dict[str, str]()
    for name, place in sorted(header.tensors.items(), key=lambda item: item[1].start):
        on_disk = survey.baseline.tensors[name].digest
        if not survey.may_have_moved(name) and holds.get(name) == on_disk:
            digests[name] = on_disk
            continue
        digests[name] = write_pieces(survey.place.ops, file, survey.pieces(name), place.start)
        survey.outcome.bytes_written += place.end - place.start
    return digests
