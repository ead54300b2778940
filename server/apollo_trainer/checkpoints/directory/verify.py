"""Verify: whether the model directory is what the last sync left. Writes nothing."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.directory.disk_values import differs
from apollo_trainer.checkpoints.directory.loaded_files import loaded_files, twins
from apollo_trainer.checkpoints.directory.manifest import Manifest
from apollo_trainer.checkpoints.directory.state_folder import (
    Place,
    held,
    place_of,
    read_manifest,
    shard_differences,
)
from apollo_trainer.checkpoints.directory.survey import Progress
from apollo_trainer.checkpoints.disk import FILES, FileOps, read_header
from apollo_trainer.checkpoints.host_memory import Staging
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.loaded_files import INDEX


@dataclass(frozen=True)
class Difference:
    """Something that is not as the last sync left it; an empty `tensor` stands for the file."""

    file: str
    tensor: str
    description: str


@dataclass
class Verification:
    """What was compared: tensors of the manifest, bytes of files read, and what differs."""

    generation: int
    tensors: int
    bytes_read: int = 0
    differences: list[Difference] = field(default_factory=list)


def verify_directory(
    directory: Path,
    reader: CheckpointReader | None = None,
    *,
    full: bool = False,
    progress: Progress = lambda *_: None,
    ops: FileOps = FILES,
    state: Path | None = None,
) -> Verification:
    """Compares the directory with its manifest.

    Args:
        reader: of the live weights, which are compared too; they must not change meanwhile.
        full: reads the files and compares digests; otherwise compares inode, size and time only.

    Raises FailedPrecondition where there was no sync yet, Unavailable while another process works
    on the directory, and OSError.
    """
    place = place_of(directory, ops, state)
    if not ops.found(place.manifest_path):
        raise FailedPrecondition(
            f"{place.directory.name} was never synced, so that nobody knows what it should hold; "
            "nothing was compared. Sync first: that reads all of it.",
            reason="NEVER_SYNCED",
        )
    with _unless_read_only(held(place)):
        manifest = read_manifest(place)
        assert manifest
        result = Verification(manifest.generation, len(manifest.tensors))
        result.differences += _of_files(place, manifest)
        total = sum(shard.size for shard in manifest.shards.values()) if full else 0
        if full:
            _read_all(place, manifest, result, progress, total)
        if reader:
            result.differences += _of_live(place, manifest, reader)
        progress(total, total, "")
    return result


@contextmanager
def _unless_read_only(lock: AbstractContextManager[None]) -> Iterator[None]:
    """Holds the lock; on a read-only disk, where nobody can write, goes on without it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
        yield


def _of_files(place: Place, manifest: Manifest) -> Iterator[Difference]:
    intent = read_manifest(place, place.intent_path)
    if intent and intent.generation > manifest.generation:
        yield Difference(
            place.intent_path.name, "", "a sync was cut off; the next one settles that"
        )
    try:
        loaded = loaded_files(place.ops, place.directory)
    except FailedPrecondition as error:
        yield Difference(INDEX, "", error.message)
        return
    for twin in twins(place.ops, place.directory, loaded):
        where = f"stands in {twin.other} too: {twin.why}"
        yield Difference(twin.file, twin.tensor, where)
    for name in sorted({*manifest.shards, *loaded.by_vllm}):
        found = place.ops.found(place.directory / name)
        if name not in manifest.shards:
            yield Difference(name, "", "the last sync did not know it")
        elif found is None:
            yield Difference(name, "", "is missing")
        elif name not in loaded.by_vllm:
            yield Difference(name, "", "is loaded by vLLM no more")
        elif not manifest.shards[name].is_at(found):
            yield Difference(name, "", "is another file, or was written to, since the last sync")
        elif place.is_linked_elsewhere(name, found):
            yield Difference(name, "", "has a second name elsewhere")


def _read_all(
    place: Place, manifest: Manifest, result: Verification, progress: Progress, total: int
) -> None:
    for name in manifest.shards:
        progress(result.bytes_read, total, name)
        path = place.directory / name
        if not place.ops.found(path):
            continue
        try:
            header = read_header(place.ops, path)
        except (OSError, ValueError) as error:
            result.differences.append(Difference(name, "", str(error)))
            continue
        found = shard_differences(place, manifest, name, header)
        result.differences += [Difference(name, tensor, what) for tensor, what in found]
        tensors = manifest.tensors_of(name).items()
        result.bytes_read += sum(
            record.place.size for n, record in tensors if header.tensors.get(n) == record.place
        )


def _of_live(place: Place, manifest: Manifest, reader: CheckpointReader) -> Iterator[Difference]:
    staging = Staging()
    for name, record in manifest.tensors.items():
        live, path = reader.read(name), place.directory / record.shard
        if live is None:
            continue
        if tuple(live.shape) != record.place.shape:
            yield Difference(record.shard, name, "the live weights have another shape")
            continue
        try:
            moved = differs(place.ops, path, record.place, staging(live), record.digest)
        except (OSError, FailedPrecondition) as error:
            yield Difference(record.shard, name, f"cannot be compared with the live one: {error}")
            continue
        if moved:
            yield Difference(record.shard, name, "the live weights differ; sync to write them")
