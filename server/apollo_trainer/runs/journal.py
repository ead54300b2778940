"""A run's steps and events before the ledger has them: what a `kill -9` cannot take.

One append to a file for each, without a flush: the kernel keeps what was written when the process
is killed, and when the machine dies the weights are gone as well. A record is a kind, a length, a
CRC and the bytes; a torn last record is as if it had not been written.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from apollo_grpc.v1 import training_pb2 as pb

FOLDER = "journal"
_HEAD = struct.Struct("<cII")
_EVENT, _BEGUN = b"E", b"B"
_STEP = struct.Struct("<q")


class Journal:
    """Appended to by the training thread. Raises OSError where the disk refuses."""

    def __init__(self, folder: Path, run_id: str):
        folder.mkdir(mode=0o700, exist_ok=True)
        self._path = folder / run_id
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)

    def begin(self, step: int) -> None:
        """Before a step's first write to the weights."""
        self._append(_BEGUN, _STEP.pack(step))

    def event(self, data: bytes) -> None:
        """A serialized event; a step's, after its last write."""
        self._append(_EVENT, data)

    def _append(self, kind: bytes, data: bytes) -> None:
        record = _HEAD.pack(kind, len(data), zlib.crc32(kind + data)) + data
        written = os.write(self._descriptor, record)
        if written != len(record):
            # Records behind half of one would never be read.
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def remove(self) -> None:
        """Once the ledger has all of it."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


@dataclass
class JournalContents:
    """What a journal tells of a run.

    Attributes:
        begun: the last step whose write had begun; 0 where none had.
    """

    events: list[pb.RunEvent] = field(default_factory=list)
    begun: int = 0


def read_journal(path: Path) -> JournalContents:
    """The records of a journal up to the first one that is not whole."""
    contents = JournalContents()
    for kind, data in _records(path.read_bytes()):
        if kind == _EVENT:
            contents.events.append(pb.RunEvent.FromString(data))
        elif kind == _BEGUN:
            contents.begun = _STEP.unpack(data)[0]
    return contents


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position + _HEAD.size <= len(data):
        kind, length, checksum = _HEAD.unpack_from(data, position)
        position += _HEAD.size
        body = data[position : position + length]
        if len(body) < length or zlib.crc32(kind + body) != checksum:
            return
        position += length
        yield kind, body
