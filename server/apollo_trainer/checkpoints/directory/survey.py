"""The live weights against the last sync: which shards changed; writes those anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from apollo_trainer.checkpoints.directory.disk_values import bytes_to_write, differs, loses_digits
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord, TensorRecord
from apollo_trainer.checkpoints.directory.spare import Digests, Spare
from apollo_trainer.checkpoints.directory.state_folder import Place, SyncMethod, announce
from apollo_trainer.checkpoints.disk import ShardHeader, digest_at, read_header, write_pieces
from apollo_trainer.checkpoints.host_memory import Staging
from apollo_trainer.weights.checkpoint_reader import CheckpointReader

Progress = Callable[[int, int, str], None]
# Version of a checkpoint tensor: every write to its live values gives it another number.
Versions = Callable[[str], int]
NEVER_SEEN = 0


@dataclass
class SyncOutcome:
    """What a sync did: bytes of live tensors that it compared, bytes of files that it wrote.

    Attributes:
        rounded: tensors that were written in a dtype that may round the live values.
    """

    method: SyncMethod = SyncMethod.UNCHANGED
    bytes_compared: int = 0
    bytes_written: int = 0
    tensors_changed: int = 0
    files_written: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)

    def begin_again(self) -> None:
        """Forgets what was written, and has been taken back."""
        self.bytes_written = self.tensors_changed = 0
        self.rounded.clear()


@dataclass
class Survey:
    """The live weights against the last generation of the directory, for one sync.

    Args:
        baseline: what the directory holds; its digests are those of the bytes on disk.
        versions: None: nobody counts the writes, so that every tensor is compared.
        began: called with each file that a sync begins to write; may raise to give the sync up.
        shards: those that changed, which the sync writes.
    """

    place: Place
    reader: CheckpointReader
    baseline: Manifest
    versions: Versions | None
    began: Callable[[str], None] = lambda _: None
    shards: list[str] = field(default_factory=list)
    outcome: SyncOutcome = field(default_factory=SyncOutcome)

    def __post_init__(self) -> None:
        self._compared, self._staging = set[str](), Staging()
        self._earlier = dict[str, Path | None]()

    def version(self, name: str) -> int:
        """The version of a live tensor now; 0 for one that belongs to no parameter."""
        counted = self.versions is not None and self.reader.parameter(name) is not None
        return self.versions(name) if self.versions and counted else NEVER_SEEN

    def may_have_moved(self, name: str) -> bool:
        """Whether a tensor was written to since the last sync, as far as is known."""
        if self.reader.parameter(name) is None:
            return False
        return self.versions is None or self.versions(name) != self.baseline.tensors[name].version

    def changed(self, shard: str) -> Iterator[str]:
        """Names of the tensors of a shard whose bytes are not those on disk."""
        path = self.place.directory / shard
        for name, record in self.baseline.tensors_of(shard).items():
            live = self._live(name) if self.may_have_moved(name) else None
            if live is not None and differs(
                self.place.ops, path, record.place, live, record.digest, self._before(shard)
            ):
                yield name

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes that a tensor is to have on disk; each piece is valid until the next one."""
        record, live = self.baseline.tensors[name], self._live(name)
        path, earlier = self.place.directory / record.shard, self._before(record.shard)
        return bytes_to_write(self.place.ops, path, record.place, live, earlier)

    def _before(self, shard: str) -> Path | None:
        """The shard before the last sync, for as long as it is there."""
        if shard not in self._earlier:
            header = self.baseline.shards[shard].header
            self._earlier[shard] = self.place.earlier(shard, header)
        return self._earlier[shard]

    def _live(self, name: str) -> torch.Tensor | None:
        tensor = self.reader.read(name)
        if tensor is None:
            return None
        if name not in self._compared:
            self._compared.add(name)
            self.outcome.bytes_compared += tensor.nbytes
        return self._staging(tensor)

    def write(self, shard: str, target: Path, spare: Spare | None = None) -> WrittenShard:
        """Writes a shard anew, on disk when this returns; its name needs its folder's fsync.

        Args:
            target: the new file; one that is there is replaced.
            spare: what it has for this shard lies at `target`, and is written over.

        Raises OSError: the new file must then be given up.
        """
        self.began(shard)
        ops, path = self.place.ops, self.place.directory / shard
        header = read_header(ops, path)
        holds = spare.take(shard, header.digest) if spare else None
        if holds is None:
            ops.remove(target)
        with ops.created(target) if holds is None else ops.opened(target, write=True) as file:
            if holds is None:
                holds = self._begun(path, header, file)
            digests = self._write(header, file, holds)
            ops.copy_attributes(path, target)
            ops.fsync(file)
        tensors = {
            name: TensorRecord(shard, place, self.version(name), digests[name])
            for name, place in header.tensors.items()
        }
        changed = [name for name in tensors if self.baseline.tensors[name].digest != digests[name]]
        self.outcome.tensors_changed += len(changed)
        self.note_rounded(changed)
        return WrittenShard(shard, ShardRecord.of(ops.stat(target), header.digest), tensors)

    def _begun(self, path: Path, header: ShardHeader, file: int) -> Digests:
        """Clones the old shard into the new file, or writes the header; returns what it holds."""
        ops = self.place.ops
        if not all(self.may_have_moved(name) for name in header.tensors):
            # Not every file system can do it.
            with contextlib.suppress(OSError), ops.opened(path) as source:
                ops.clone(source, file)
                return {name: self.baseline.tensors[name].digest for name in header.tensors}
        ops.write_all(file, memoryview(header.raw), 0)
        self.outcome.bytes_written += len(header.raw)
        return {}

    def _write(self, header: ShardHeader, file: int, holds: Digests) -> Digests:
        """Writes the tensors that the file does not hold yet, in its order; returns all digests."""
        digests = dict[str, str]()
        for name, place in sorted(header.tensors.items(), key=lambda item: item[1].start):
            on_disk = self.baseline.tensors[name].digest
            if not self.may_have_moved(name) and holds.get(name) == on_disk:
                digests[name] = on_disk
                continue
            digests[name] = write_pieces(self.place.ops, file, self.pieces(name), place.start)
            self.outcome.bytes_written += place.size
        return digests

    def note_rounded(self, names: Iterable[str]) -> None:
        """Notes those of the written tensors whose dtype on disk may round the live values."""
        for name in names:
            live = self.reader.outline(name)
            if live is not None and loses_digits(live.dtype, self.baseline.tensors[name].place):
                self.outcome.rounded.append(name)

    def announce(self, method: SyncMethod, written: list[WrittenShard]) -> Manifest:
        """Puts the next manifest on disk as the intent; returns it. Raises OSError."""
        manifest = self.next_manifest(method, written)
        # The last moment at which all is as it was.
        self.began(self.place.intent_path.name)
        announce(self.place, manifest)
        return manifest

    def next_manifest(self, method: SyncMethod, written: list[WrittenShard]) -> Manifest:
        """The directory's next generation, once these shards are in it."""
        records = {shard.name: shard.record for shard in written}
        tensors = {
            name: replace(record, version=self.version(name))
            for name, record in self.baseline.tensors.items()
            if record.shard not in records
        }
        for shard in written:
            tensors |= shard.tensors
        shards = {**self.baseline.shards, **records}
        generation, model = self.baseline.generation + 1, self.place.directory.name
        return Manifest(generation, model, method, tuple(records), shards, tensors)


@dataclass(frozen=True)
class WrittenShard:
    """A new version of a shard, on disk."""

    name: str
    record: ShardRecord
    tensors: dict[str, TensorRecord]


def read_baseline(place: Place, headers: dict[str, ShardHeader]) -> Manifest:
    """Generation 0: what a directory holds that was never synced. Reads all of it."""
    shards, tensors = {}, {}
    for shard, header in headers.items():
        path = place.directory / shard
        shards[shard] = ShardRecord.of(place.ops.stat(path), header.digest)
        with place.ops.opened(path) as file:
            for name, at in header.tensors.items():
                tensors[name] = TensorRecord(shard, at, NEVER_SEEN, digest_at(place.ops, file, at))
    model = place.directory.name
    return Manifest(0, model, SyncMethod.UNCHANGED, (), shards, tensors)
