"""The journal: a run's write-ahead log, so that a `kill -9` loses no event and no begun step.

Each event is appended before the ledger has it, each step before its first write to the weights.
Nothing is flushed: the kernel keeps what was written when the process is killed, and when the
machine dies the weights are gone as well. A record is a kind, a length, a CRC and the bytes; a torn
last record is as if it had not been written.

A journal is a row of segments: `<run>`, `<run>.1`, `<run>.2`, ... A full segment is followed by a
new one as soon as the ledger has all that is in the segments before it. The new one begins with the
last begun step; only then the segments that the ledger has are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from apollo_grpc.v1 import training_pb2 as pb

FOLDER = "journal"
# Twice as much, and a record more each, is the most that a journal has on disk, beside what the
# ledger did not have at once.
SEGMENT_BYTES = 512 * 1024
_NAME = re.compile(r"([^.]+)(?:\.([0-9]+))?")
_HEAD = struct.Struct("<cII")
_EVENT, _BEGUN = b"E", b"B"
_STEP = struct.Struct("<q")


class Journal:
    """The journal of one run, for one thread at a time.

    Raises OSError where the disk refuses; what was written before is kept.
    """

    def __init__(self, folder: Path, run_id: str):
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder, self._run_id = folder, run_id
        self._begun = self._last = self._last_before = 0
        self._open(0)

    def _open(self, number: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        name = f"{self._run_id}.{number}" if number else self._run_id
        self._descriptor = os.open(self._folder / name, flags, 0o600)
        self._number, self._size, self._marked = number, 0, 0

    def begin(self, step: int) -> None:
        """Notes, before a step's first write to the weights; twice for one step is once."""
        if step > self._begun:
            self._begun = step
            self._append(b"")

    def event(self, event: pb.RunEvent, in_ledger: int = 0) -> None:
        """Appends an event; that of a step, after its last write.

        Args:
            in_ledger: everything up to this sequence is in the ledger.
        """
        if self._size >= SEGMENT_BYTES and self._last_before <= in_ledger:
            with contextlib.suppress(OSError):
                self._begin_segment(in_ledger)
        self._append(_record(_EVENT, event.SerializeToString()))
        self._last = event.sequence

    def _begin_segment(self, in_ledger: int) -> None:
        full, before = self._descriptor, _segments(self._folder, self._run_id)
        self._open(self._number + 1)
        os.close(full)
        self._last_before = self._last
        if self._begun:
            self._append(b"")
        for path in before if self._last <= in_ledger else before[:-1]:
            path.unlink()

    def _append(self, record: bytes) -> None:
        if self._marked != self._begun:
            # In one write with what follows it; also where it could not be written before.
            record = _record(_BEGUN, _STEP.pack(self._begun)) + record
        written = os.write(self._descriptor, record)
        if written != len(record):
            # Records behind half of one would never be read.
            os.ftruncate(self._descriptor, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._run_id)
        self._size, self._marked = self._size + written, self._begun

    def close(self) -> None:
        """Keeps the files for the next start. Called last, and once."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Closes and removes the files, once the ledger has all of it. Called last, and once."""
        self.close()
        remove_journal(self._folder, self._run_id)


def _record(kind: bytes, data: bytes) -> bytes:
    return _HEAD.pack(kind, len(data), zlib.crc32(kind + data)) + data


@dataclass
class JournalContents:
    """What a journal says of a run.

    Attributes:
        begun: the last step whose write had begun; 0 where none had.
    """

    events: list[pb.RunEvent] = field(default_factory=list)
    begun: int = 0


def journals_in(folder: Path) -> list[str]:
    """Returns the ids of the runs that have a journal."""
    return sorted({name[1] for name in _names(folder)})


def read_journal(folder: Path, run_id: str) -> JournalContents:
    """Reads the records of each segment up to the first one that is not whole."""
    contents = JournalContents()
    for path in _segments(folder, run_id):
        for kind, data in _records(path.read_bytes()):
            if kind == _EVENT:
                contents.events.append(pb.RunEvent.FromString(data))
            elif kind == _BEGUN:
                contents.begun = _STEP.unpack(data)[0]
    return contents


def remove_journal(folder: Path, run_id: str) -> None:
    """Removes its files. Raises OSError where the disk refuses."""
    for path in _segments(folder, run_id):
        path.unlink(missing_ok=True)


def _segments(folder: Path, run_id: str) -> list[Path]:
    """The files of a journal, the oldest first."""
    numbers = sorted((int(name[2] or 0), name[0]) for name in _names(folder) if name[1] == run_id)
    return [folder / name for _, name in numbers]


def _names(folder: Path) -> Iterator[re.Match[str]]:
    return filter(None, (_NAME.fullmatch(path.name) for path in folder.glob("*")))


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
