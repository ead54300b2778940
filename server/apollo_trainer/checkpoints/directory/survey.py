"""What a sync has to write: which shards hold a tensor whose bytes moved since the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from apollo_trainer.checkpoints.directory.disk_values import bytes_to_write, differs, loses_digits
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord, TensorRecord
from apollo_trainer.checkpoints.directory.state_folder import Place, SyncMethod
from apollo_trainer.checkpoints.disk import DTYPES, ShardHeader, digest_at, digest_of
from apollo_trainer.checkpoints.host_memory import Staging
from apollo_trainer.weights.checkpoint_reader import CheckpointReader

Progress = Callable[[int, int, str], None]
# A number for a checkpoint tensor that is another one after every write to its live values.
Versions = Callable[[str], int]
NEVER_SEEN = 0


@dataclass
class SyncOutcome:
    """What a sync did; bytes of live tensors compared and of files written.

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
        """What was written was taken back."""
        self.bytes_written = self.tensors_changed = 0
        self.rounded.clear()


@dataclass
class Survey:
    """The live weights against the last generation of the directory.

    Args:
        baseline: what the directory holds; its digests are those of the bytes on disk.
        versions: None: nobody counts the writes, so that every tensor is compared.
    """

    place: Place
    reader: CheckpointReader
    baseline: Manifest
    versions: Versions | None
    outcome: SyncOutcome = field(default_factory=SyncOutcome)

    def __post_init__(self) -> None:
        self._compared, self._staging = set[str](), Staging()
        self._earlier = dict[str, Path | None]()
        self._of_shard: dict[str, list[str]] = {name: [] for name in self.baseline.shards}
        for name, tensor in self.baseline.tensors.items():
            self._of_shard[tensor.shard].append(name)

    def version(self, name: str) -> int:
        """Of a live tensor now; 0 for what belongs to no parameter."""
        counted = self.versions is not None and self.reader.parameter(name) is not None
        return self.versions(name) if self.versions and counted else NEVER_SEEN

    def may_have_moved(self, name: str) -> bool:
        """Whether a tensor was written to since the last sync, as far as is known."""
        if self.reader.parameter(name) is None:
            return False
        return self.versions is None or self.versions(name) != self.baseline.tensors[name].version

    def any_may_have_moved(self) -> bool:
        """The same of all; no tensor is looked at."""
        return any(self.may_have_moved(name) for name in self.baseline.tensors)

    def changed(self, shard: str) -> Iterator[str]:
        """Names of the tensors of a shard whose bytes are not those on disk."""
        for name in self._of_shard[shard]:
            record = self.baseline.tensors[name]
            path, live = self.place.directory / record.shard, None
            if self.may_have_moved(name):
                live = self._live(name)
            if live is not None and differs(
                self.place.ops, path, record.place, live, record.digest, self._before(shard)
            ):
                yield name

    def outline(self, name: str) -> torch.Tensor:
        """Shape and dtype of a tensor on disk, without values."""
        place = self.baseline.tensors[name].place
        return torch.empty(place.shape, dtype=DTYPES[place.dtype], device="meta")

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes that a tensor is to have on disk; they hold until the next ones."""
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

    def note_rounded(self, names: Iterable[str]) -> None:
        """Of tensors that are written: those whose dtype on disk may round the live values."""
        for name in names:
            live = self.reader.outline(name)
            if live is not None and loses_digits(live.dtype, self.baseline.tensors[name].place):
                self.outcome.rounded.append(name)

    def next_manifest(self, method: SyncMethod, written: list[WrittenShard]) -> Manifest:
        """The directory's next generation, once these shards are in it."""
        shards, tensors = dict(self.baseline.shards), dict[str, TensorRecord]()
        replaced = {shard.name: shard for shard in written}
        for name, record in self.baseline.tensors.items():
            if record.shard not in replaced:
                digest, place = record.digest, record.place
                tensors[name] = TensorRecord(record.shard, place, self.version(name), digest)
        for name, shard in replaced.items():
            shards[name] = shard.record
            tensors |= shard.tensors
        generation = self.baseline.generation + 1
        model = self.place.directory.name
        return Manifest(generation, model, method, tuple(replaced), shards, tensors)


@dataclass(frozen=True)
class WrittenShard:
    """A new version of a shard, on disk."""

    name: str
    record: ShardRecord
    tensors: dict[str, TensorRecord]


def read_baseline(
    place: Place, headers: dict[str, ShardHeader], read: Callable[[int], None]
) -> Manifest:
    """Generation 0: what a directory holds that was never synced. Reads all of it."""
    shards, tensors = {}, {}
    for shard, header in headers.items():
        path = place.directory / shard
        shards[shard] = ShardRecord.of(place.ops.stat(path), digest_of(header.raw))
        with place.ops.opened(path) as file:
            for name, at in header.tensors.items():
                digest = digest_at(place.ops, file, at, read)
                tensors[name] = TensorRecord(shard, at, NEVER_SEEN, digest)
    model = place.directory.name
    return Manifest(0, model, SyncMethod.UNCHANGED, (), shards, tensors)
