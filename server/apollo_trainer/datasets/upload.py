"""A dataset on its way: written as it comes, and there only once all of it is on disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_grpc.errors import (
    ApolloError,
    FailedPrecondition,
    InvalidArgument,
    Quota,
    ResourceExhausted,
)
from apollo_grpc.times import now
from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.disk import TEMPORARY, FileOps
from apollo_trainer.datasets.file_format import ID_DIGITS, ending, records
from apollo_trainer.datasets.room import Room

if TYPE_CHECKING:
    from apollo_trainer.datasets.store import DatasetStore

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Upload:
    """A file that samples are added to, until `publish` makes a dataset of it. Made without a disk.

    Any thread; one at a time goes on. All but `close` raise ResourceExhausted with DATASETS_FULL or
    DISK_FULL, and FailedPrecondition with DATASET_NOT_WRITTEN where the disk refuses otherwise.

    Args:
        folder: of the store, on the disk of which nothing is there under another name.
        most: samples that a dataset may have.
    """

    def __init__(
        self, store: DatasetStore, folder: Path, name: str, room: Room, most: int, ops: FileOps
    ):
        self._store, self._room, self._most, self._ops = store, room, most, ops
        self._about = dataset_pb2.Dataset(name=name)
        self._digest, self._counted = hashlib.sha256(), 0
        # A call that was left is closed while a thread still writes for it.
        self._lock = threading.RLock()
        self._path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        self._file: int | None = None
        self._ended = False

    @property
    def samples(self) -> int:
        """Samples that it has so far."""
        return self._about.samples

    def add(self, samples: Sequence[pb.Sample]) -> None:
        """Writes the samples that follow."""
        if self._about.samples + len(samples) > self._most:
            raise ResourceExhausted(
                f"samples: are more than {self._most}, which a dataset has at most; nothing of it "
                "was kept. Bring them as several datasets, for a run each.",
                reason="DATASET_TOO_LARGE",
                metadata={"limit": str(self._most)},
                quota=Quota("dataset_samples", f"at most {self._most}"),
            )
        data = records(samples)
        with self._lock, _told():
            file = self._open_file()
            self._room.take(len(data))
            self._counted += len(data)
            self._write(file, data, self._about.size_bytes)
        self._about.size_bytes += len(data)
        self._about.samples += len(samples)
        self._digest.update(data)

    def flush(self) -> None:
        """Puts the samples on disk. Raises InvalidArgument where there are none."""
        if not self._about.samples:
            raise InvalidArgument.at("samples", "is empty: nothing to learn")
        self._about.digest = self._digest.hexdigest()
        self._about.dataset_id = self._about.digest[:ID_DIGITS]
        self._about.create_time.CopyFrom(now())
        with self._lock, _told():
            self._ops.fsync(self._open_file())

    def publish(self) -> dataset_pb2.Dataset:
        """Makes it a dataset, after `flush`; returns it once a crash leaves it whole.

        Of samples that are there already, the first one's name and time stay.
        """
        with self._lock, _told():
            made = self._store.publish(self._path, self._about, self._end_with)
            self._counted = 0  # The store's from here on.
            return made

    def _end_with(self, about: dataset_pb2.Dataset) -> None:
        file = self._open_file()
        self._write(file, ending(about), about.size_bytes)
        self._ops.fsync(file)

    def close(self) -> None:
        """Gives up what did not become a dataset. Idempotent."""
        with self._lock:
            file, self._file, self._ended = self._file, None, True
            self._room.give_back(self._counted)
            self._counted = 0
            if file is None:
                return
            self._ops.close(file)
        # What made it fail must be told, not that its remains are there until the next start.
        with contextlib.suppress(OSError):
            self._ops.remove(self._path)

    def _write(self, file: int, data: bytes, at: int) -> None:
        self._ops.write_all(file, memoryview(data), at)
        self._ops.start_writing(file, len(data), at)

    def _open_file(self) -> int:
        if self._ended:
            raise ValueError("the upload has ended")
        if self._file is None:
            self._file = self._ops.create(self._path)
        return self._file


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raises what the disk refuses as a domain error."""
    try:
        yield
    except OSError as error:
        raise not_written(error) from error


def not_written(error: OSError) -> ApolloError:
    """The error for a disk that refuses."""
    says = (
        f"The state folder's disk refused the dataset ({error.strerror}); nothing of it was kept, "
        "and those that are there are as they were. Make room there, then send it again."
    )
    if error.errno in _NO_ROOM:
        return ResourceExhausted(says, reason="DISK_FULL")
    return FailedPrecondition(says, reason="DATASET_NOT_WRITTEN")
