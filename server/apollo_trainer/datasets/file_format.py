"""One file a dataset: its samples, what they are, and a tail that tells where both end.

    samples   each as the message Sample, behind its size in bytes (4, little-endian)
    Dataset   the message: all but its id
    tail      size of that message (4 bytes), its SHA-256 (32), "apolloD1"

What they are comes last: it is known last, and nothing that was written is written over. A file
that lacks its tail is none.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from apollo_grpc.errors import DataLoss, NotFound, Resource
from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.disk import FILES, FileOps

ID_DIGITS = 32
_SIZE = struct.Struct("<I")
_TAIL = struct.Struct("<I32s8s")
_MARK = b"apolloD1"
_PIECE = 2**20
_MAX_ABOUT_BYTES = 2**16


def records(samples: Iterable[pb.Sample]) -> bytes:
    """The samples as the file has them: the same samples are the same bytes."""
    parts = (sample.SerializeToString(deterministic=True) for sample in samples)
    return b"".join(_SIZE.pack(len(part)) + part for part in parts)


def ending(dataset: dataset_pb2.Dataset) -> bytes:
    """What follows the samples of a file."""
    about = dataset_pb2.Dataset()
    about.CopyFrom(dataset)
    about.ClearField("dataset_id")
    data = about.SerializeToString(deterministic=True)
    return data + _TAIL.pack(len(data), hashlib.sha256(data).digest(), _MARK)


def read_about(path: Path, ops: FileOps = FILES) -> dataset_pb2.Dataset:
    """What the samples of a file are, with the id; they themselves are not looked at.

    Raises DataLoss for a file that is not whole, OSError.
    """
    size = ops.stat(path).st_size
    with ops.opened(path) as file:
        tail = ops.pread(file, _TAIL.size, max(0, size - _TAIL.size))
        length, digest, mark = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, b"", b"")
        begin = size - _TAIL.size - length
        if mark != _MARK or begin < 0 or length > _MAX_ABOUT_BYTES:
            raise damaged(path)
        data = ops.pread(file, length, begin)
    if hashlib.sha256(data).digest() != digest:
        raise damaged(path)
    about = dataset_pb2.Dataset.FromString(data)
    about.dataset_id = about.digest[:ID_DIGITS]
    if about.size_bytes != begin or about.dataset_id != path.name:
        raise damaged(path)
    return about


class StoredSamples(Collection[pb.Sample]):
    """The samples of a file, read anew each time they are gone through; none is kept.

    Going through them raises DataLoss, before the first one, where they are not those that were
    brought, NotFound where they were deleted. Any thread.
    """

    def __init__(self, path: Path, about: dataset_pb2.Dataset, ops: FileOps = FILES):
        self._path, self._about, self._ops = path, about, ops

    def __len__(self) -> int:
        return self._about.samples

    def __contains__(self, sample: object) -> bool:
        return any(each == sample for each in self)

    def __iter__(self) -> Iterator[pb.Sample]:
        try:
            with self._ops.opened(self._path) as file:
                self._require_whole(file)
                yield from self._each(file)
        except FileNotFoundError:
            raise missing(self._path.name) from None
        except (OSError, DecodeError, struct.error) as error:
            raise damaged(self._path) from error

    def _require_whole(self, file: int) -> None:
        running, size = hashlib.sha256(), self._about.size_bytes
        for at in range(0, size, _PIECE):
            running.update(self._ops.pread(file, min(_PIECE, size - at), at))
        if running.hexdigest() != self._about.digest:
            raise damaged(self._path)

    def _each(self, file: int) -> Iterator[pb.Sample]:
        at = 0
        while at < self._about.size_bytes:
            (size,) = _SIZE.unpack(self._ops.pread(file, _SIZE.size, at))
            yield pb.Sample.FromString(self._ops.pread(file, size, at + _SIZE.size))
            at += _SIZE.size + size


def damaged(path: Path) -> DataLoss:
    """The error for a file that is not what was written, or cannot be read."""
    return DataLoss(
        f"The samples of dataset {path.name} are not those that were brought, or cannot be read; "
        "its file was left as it is. Bring them again, which puts them back, or delete it.",
        reason="DATASET_DAMAGED",
        resource=Resource("dataset", path.name),
    )


def missing(dataset_id: str) -> NotFound:
    """The error for a dataset that is not there."""
    return NotFound(
        f"There is no dataset {dataset_id[:60]!r}. 'apollo datasets list' shows those that are "
        "kept; bring it with 'apollo datasets add'.",
        reason="DATASET_NOT_FOUND",
        resource=Resource("dataset", dataset_id[:60]),
    )
