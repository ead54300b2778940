"""The state folder beside a model directory: the lock, the manifest, and what is being built."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_trainer.checkpoints.directory.loaded_files import loaded_files
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.disk import (
    FILES,
    FileOps,
    ShardHeader,
    digest_at,
    durable_bytes,
    hex_digest,
    read_header,
)

_BEFORE = "before-"


class SyncMethod(StrEnum):
    """How a generation came about; the names are those of the contract."""

    UNCHANGED = "unchanged"
    EXCHANGE = "exchange"
    ROLLFORWARD = "rollforward"
    IN_PLACE = "in_place"


@dataclass(frozen=True)
class Place:
    """A model directory, its state folder, and the file operations for both."""

    directory: Path
    state: Path
    ops: FileOps = FILES

    @property
    def manifest_path(self) -> Path:
        """What the directory held after the last sync."""
        return self.state / "manifest.json"

    @property
    def intent_path(self) -> Path:
        """What the sync at work makes of the directory: the intent."""
        return self.state / "manifest.next.json"

    @property
    def next_folder(self) -> Path:
        """The folder to be exchanged with the directory."""
        return self.state / "tmp-next"

    def before(self, generation: int) -> Path:
        """Where the directory of an earlier generation is kept."""
        return self.state / f"{_BEFORE}{generation}"

    def left_before(self) -> list[int]:
        """The earlier generations whose directories are still there, the oldest first."""
        names = self.ops.names(self.state) if self.ops.found(self.state) else []
        numbers = [name.removeprefix(_BEFORE) for name in names if name.startswith(_BEFORE)]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def earlier(self, shard: str, header: str) -> Path | None:
        """The file of a shard before the last sync; None where it is gone or has another header.

        Args:
            header: the digest of the header that it must have.
        """
        try:
            path = self.before(self.left_before()[-1]) / shard
            return path if read_header(self.ops, path).digest == header else None
        except (IndexError, OSError, ValueError):
            return None

    @property
    def aside(self) -> Path:
        """Where config.json waits while shards are of two generations, so that no loader mixes."""
        return self.directory / ".config.json.apollo-aside"

    def beside(self, shard: str) -> Path:
        """Where a new shard waits for its rename."""
        return self.directory / f".{shard}.apollo-next"

    def is_linked_elsewhere(self, shard: str, found: os.stat_result) -> bool:
        """Whether a shard has a name outside the directory and its earlier generations."""
        ours = 1
        if found.st_nlink > 1:
            earlier = [self.ops.found(self.before(n) / shard) for n in self.left_before()]
            ours += sum(old is not None and old.st_ino == found.st_ino for old in earlier)
        return found.st_nlink > ours

    def redo(self, generation: int) -> Path:
        """The redo log of a sync in place."""
        return self.state / f"redo-{generation}.safetensors"

    @property
    def to_begin_anew(self) -> str:
        """What a person does where a sync cannot be finished; snapshots stay."""
        return (
            "If vLLM still serves what was learned, `apollo checkpoint export FOLDER` keeps it. "
            "Bring the directory back from a copy, then remove "
            f"{self.manifest_path} and {self.intent_path}."
        )

    def seen(self) -> dict[str, ShardRecord]:
        """Records of the shards, where the directory was never synced; empty where it was."""
        if self.ops.found(self.manifest_path):
            return {}
        try:
            names = self.shard_names()
            return {n: ShardRecord.of(self.ops.stat(self.directory / n), "") for n in names}
        except (FailedPrecondition, OSError):
            return {}

    def shard_names(self) -> list[str]:
        """Names of the safetensors that vLLM loads, sorted. Raises as `loaded_files`."""
        return loaded_files(self.ops, self.directory).by_vllm


def place_of(directory: Path, ops: FileOps = FILES, state: Path | None = None) -> Place:
    """The place of a directory; of a link, that of the folder that it points to."""
    resolved = directory.resolve()
    # Among the snapshots, the hub's tools would take it for a revision that nobody refers to.
    beside = hub_repository(resolved) or resolved.parent
    return Place(resolved, state or beside / f".{resolved.name}.apollo", ops)


def hub_repository(directory: Path) -> Path | None:
    """The `models--ORG--NAME` of a hub cache whose snapshot a directory is; None for any other."""
    snapshots = directory.parent
    is_one = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent if is_one else None


def place_under(directory: Path, states: Path | None) -> Place:
    """The place of a directory whose state folder is below `states`; None: beside the directory."""
    resolved = directory.resolve()
    if states is None:
        return place_of(resolved)
    # Two models of one name would otherwise take each other's manifest for theirs.
    which = hex_digest([bytes(resolved)])[:12]
    return place_of(resolved, state=states.resolve() / f"{resolved.name}-{which}.apollo")


@contextlib.contextmanager
def held(place: Place, lock: str = "LOCK") -> Iterator[None]:
    """Holds a lock of the state folder for one sync or the like; makes the folder if it must.

    Raises Unavailable while another process holds it, OSError where the folder cannot be made.
    """
    if not place.ops.found(place.state):
        place.ops.mkdir(place.state)
        # A commit record in a folder that a power failure takes away is none.
        place.ops.sync_folder(place.state.parent)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(place.ops.locked(place.state / lock))
        except BlockingIOError as error:
            raise Unavailable(
                f"Another process is at work on {place.directory.name}; nothing was written. Two "
                "training servers cannot keep one model directory: stop one, then try again.",
                reason="STATE_FOLDER_BUSY",
            ) from error
        yield


def owned(place: Place) -> contextlib.AbstractContextManager[None]:
    """Holds another lock, of the one server that keeps the directory; raises as `held`.

    Two of them would write over each other's weights, and remove what the other one is building.
    """
    return held(place, "OWNER")


def read_manifest(place: Place, path: Path | None = None) -> Manifest | None:
    """The manifest, or the intent; None where there is no file.

    Raises FailedPrecondition for a file that is no manifest or of another directory, and OSError.
    """
    path = path or place.manifest_path
    if not place.ops.found(path):
        return None
    try:
        manifest = Manifest.decode(place.ops.read(path))
    except ValueError as error:
        raise FailedPrecondition(
            f"{path} is no manifest ({error}); the model directory was left as it is. Move the "
            "file away to have the next sync read and compare the whole directory.",
            reason="MANIFEST_UNREADABLE",
        ) from error
    if manifest.model != place.directory.name:
        raise FailedPrecondition(
            f"{path} is the manifest of {manifest.model!r}, not of {place.directory.name!r}; "
            "nothing was written. Move it away if the directory was renamed.",
            reason="MANIFEST_OF_ANOTHER_DIRECTORY",
        )
    return manifest


def announce(place: Place, intent: Manifest) -> None:
    """Puts on disk what the directory is to become, and the names of the folder's new files."""
    durable_bytes(place.intent_path, intent.encode(), place.ops)


def commit(place: Place, manifest: Manifest) -> None:
    """The commit point: from here on the directory is of this generation."""
    durable_bytes(place.manifest_path, manifest.encode(), place.ops)
    # An intent that is not newer than the manifest is ignored, so that nothing waits for this.
    with contextlib.suppress(OSError):
        place.ops.remove(place.intent_path)
        place.ops.remove(place.redo(manifest.generation))


def changed_shards(place: Place, shards: Mapping[str, ShardRecord]) -> list[str]:
    """Names of shards that came, went, or are other files than these, sorted. Reads no shard."""
    files = {name: place.ops.found(place.directory / name) for name in place.shard_names()}
    names = sorted({*shards, *files})
    return [n for n in names if n not in shards or not shards[n].is_at(files.get(n))]


def is_untouched(place: Place, manifest: Manifest) -> bool:
    """Whether the directory's shards are the very files that the manifest describes."""
    return not changed_shards(place, manifest.shards)


def refreshed(place: Place, manifest: Manifest) -> Manifest | None:
    """The manifest with the files that hold its bytes now; None where they hold others.

    A directory that was copied back or touched is the same one; so is one whose bytes are equal.
    Reads the shards that are not the very files of the manifest.
    """
    if place.shard_names() != sorted(manifest.shards):
        return None
    shards = dict(manifest.shards)
    for name in changed_shards(place, shards):
        path = place.directory / name
        try:
            header = read_header(place.ops, path)
        except ValueError:
            return None
        if any(shard_differences(place, manifest, name, header)):
            return None
        shards[name] = ShardRecord.of(place.ops.stat(path), header.digest)
    return replace(manifest, shards=shards)


def shard_differences(
    place: Place, manifest: Manifest, name: str, header: ShardHeader
) -> Iterator[tuple[str, str]]:
    """Reads a shard: which tensors are not as the manifest has them, and why; "" is the header."""
    if header.digest != manifest.shards[name].header:
        yield "", "its header is another one"
    with place.ops.opened(place.directory / name) as file:
        for tensor, record in manifest.tensors_of(name).items():
            if header.tensors.get(tensor) != record.place:
                yield tensor, "is missing, or lies elsewhere"
            elif digest_at(place.ops, file, record.place) != record.digest:
                yield tensor, "its bytes on disk are not those that were written"
