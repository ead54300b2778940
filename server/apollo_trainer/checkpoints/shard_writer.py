"""Writes a shard anew from the live weights, and what only the old file holds from there."""

from __future__ import annotations

import contextlib
from pathlib import Path

from apollo_trainer.checkpoints.manifest import ShardRecord, TensorRecord
from apollo_trainer.checkpoints.shard_header import ShardHeader
from apollo_trainer.checkpoints.survey import Survey, WrittenShard
from apollo_trainer.checkpoints.tensor_file import (
    bytes_of,
    copy_piecewise,
    digest_of,
    write_piecewise,
)


def write_shard(survey: Survey, shard: str, target: Path) -> WrittenShard:
    """Writes `target`, and flushes it; its name is on disk after its folder's fsync only.

    Raises OSError: the new file must then be given up.
    """
    ops, path = survey.place.ops, survey.place.directory / shard
    old, new = survey.header_for(shard)
    file = ops.create(target)
    try:
        with ops.opened(path) as source:
            if old is new and _cloned(survey, source, file):
                digests = _write_moved(survey, new, file)
            else:
                ops.write_all(file, memoryview(new.raw), 0)
                digests = _write_all(survey, old, new, source, file)
        ops.copy_owner_and_mode(path, target)
        ops.fsync(file)
    finally:
        ops.close(file)
    survey.outcome.bytes_written += new.size
    tensors = {
        name: TensorRecord(shard, place, survey.version(name), digests[name])
        for name, place in new.tensors.items()
    }
    changed = (survey.baseline.tensors[name].digest != digests[name] for name in tensors)
    survey.outcome.tensors_changed += sum(changed)
    return WrittenShard(shard, ShardRecord.of(ops.stat(target), digest_of(new.raw)), tensors)


def _cloned(survey: Survey, source: int, file: int) -> bool:
    """Whether the new file shares the blocks of the old one, where the file system can do that."""
    with contextlib.suppress(OSError):
        survey.place.ops.clone(source, file)
        return True
    return False


def _write_moved(survey: Survey, header: ShardHeader, file: int) -> dict[str, str]:
    """Over a clone: the tensors that moved, and the digests of all."""
    digests = {name: survey.baseline.tensors[name].digest for name in header.tensors}
    for name, place in header.tensors.items():
        if survey.may_have_moved(name):
            data = bytes_of(survey.live(name))
            digests[name] = write_piecewise(survey.place.ops, file, data, place.start)
    return digests


def _write_all(
    survey: Survey, old: ShardHeader, new: ShardHeader, source: int, file: int
) -> dict[str, str]:
    """Into an empty file: every tensor, in the order of the file."""
    ops, digests = survey.place.ops, {}
    for name, place in sorted(new.tensors.items(), key=lambda item: item[1].start):
        if survey.reader.outline(name) is None:
            offset = place.start - old.tensors[name].start
            digests[name] = copy_piecewise(ops, source, file, old.tensors[name], offset)
        else:
            digests[name] = write_piecewise(ops, file, bytes_of(survey.live(name)), place.start)
    return digests
