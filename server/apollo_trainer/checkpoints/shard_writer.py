"""Writes a shard anew from the live weights, and what only the old file holds from there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from apollo_trainer.checkpoints.manifest import ShardRecord, TensorRecord
from apollo_trainer.checkpoints.shard_header import ShardHeader
from apollo_trainer.checkpoints.spare import Digests, Spare
from apollo_trainer.checkpoints.survey import Survey, WrittenShard
from apollo_trainer.checkpoints.tensor_file import (
    bytes_of,
    copy_piecewise,
    digest_of,
    write_piecewise,
)


def write_shard(
    survey: Survey, shard: str, target: Path, spare: Spare | None = None
) -> WrittenShard:
    """Writes `target`, and flushes it; its name is on disk after its folder's fsync only.

    Args:
        spare: may have a shard at `target` already, to be written over.

    Raises OSError: the new file must then be given up.
    """
    ops, path = survey.place.ops, survey.place.directory / shard
    old, new = survey.header_for(shard)
    holds = spare.take(shard, digest_of(new.raw)) if spare else None
    file = _new_file(survey, target) if holds is None else ops.open(target, write=True)
    try:
        with ops.opened(path) as source:
            if holds is None:
                holds = _begun(survey, old, new, source, file)
            digests = _write(survey, _Shard(old, new, source, file), holds)
        ops.copy_owner_and_mode(path, target)
        ops.fsync(file)
    finally:
        ops.close(file)
    tensors = {
        name: TensorRecord(shard, place, survey.version(name), digests[name])
        for name, place in new.tensors.items()
    }
    changed = (survey.baseline.tensors[name].digest != digests[name] for name in tensors)
    survey.outcome.tensors_changed += sum(changed)
    return WrittenShard(shard, ShardRecord.of(ops.stat(target), digest_of(new.raw)), tensors)


@dataclass(frozen=True)
class _Shard:
    """Headers of the file on disk and of the new one, and descriptors of both."""

    old: ShardHeader
    new: ShardHeader
    source: int
    file: int


def _new_file(survey: Survey, target: Path) -> int:
    survey.place.ops.remove(target)
    return survey.place.ops.create(target)


def _begun(survey: Survey, old: ShardHeader, new: ShardHeader, source: int, file: int) -> Digests:
    """Digests of the tensors that an empty file holds now: with its header, or as a clone."""
    moved = all(survey.may_have_moved(name) for name in new.tensors)
    if old is new and not moved and _cloned(survey, source, file):
        return {name: survey.baseline.tensors[name].digest for name in new.tensors}
    survey.place.ops.write_all(file, memoryview(new.raw), 0)
    survey.outcome.bytes_written += len(new.raw)
    return {}


def _cloned(survey: Survey, source: int, file: int) -> bool:
    """Whether the new file shares the blocks of the old one, where the file system can do that."""
    with contextlib.suppress(OSError):
        survey.place.ops.clone(source, file)
        return True
    return False


def _write(survey: Survey, shard: _Shard, holds: Digests) -> Digests:
    """Writes what the file does not hold yet, in its order; returns the digests of all."""
    digests = dict[str, str]()
    for name, place in sorted(shard.new.tensors.items(), key=lambda item: item[1].start):
        on_disk = survey.baseline.tensors[name].digest
        if not survey.may_have_moved(name) and holds.get(name) == on_disk:
            digests[name] = on_disk
            continue
        digests[name] = _write_tensor(survey, shard, name)
        survey.outcome.bytes_written += place.end - place.start
    return digests


def _write_tensor(survey: Survey, shard: _Shard, name: str) -> str:
    ops, place = survey.place.ops, shard.new.tensors[name]
    if survey.reader.outline(name) is not None:
        return write_piecewise(ops, shard.file, bytes_of(survey.live(name)), place.start)
    there = shard.old.tensors[name]
    return copy_piecewise(ops, shard.source, shard.file, there, place.start - there.start)
