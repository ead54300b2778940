"""A differential on disk: the difference between the tensors of an anchor and of a snapshot.

It is a safetensors file; that library checks its layout. Each tensor is a row of frames
(frames.py), uint8 [bytes], under the parameter's name. The header has the codec, dtype and shape of
each, and the digests of its old and new bytes. Nothing in it is trusted: a file that `write_delta`
would not write is refused, and sizes are checked before memory is allocated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from apollo_grpc.errors import DataLoss
from apollo_trainer.checkpoints.disk import (
    FILES,
    FileOps,
    RunningDigest,
    algorithm_of,
    digest,
    matches,
    raw_bytes,
    spread,
    write_tensors,
)
from apollo_trainer.checkpoints.host_memory import Memory, empty_like_host
from apollo_trainer.checkpoints.snapshots import frames

FORMAT = "apollo-delta-2"
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}
_ID = re.compile(r"[0-9]{8}-[0-9a-f]{12}")
_NAME = re.compile(r"[^\x00-\x1f/\\]{1,500}")
_OTHER_OLD = "{} is not what it was in the anchor"


@dataclass(frozen=True)
class DeltaEntry:
    """What a differential says of one tensor; `old` and `new` are digests."""

    codec: str
    dtype: str
    shape: tuple[int, ...]
    old: str
    new: str


_FIELDS = {field.name for field in fields(DeltaEntry)}


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor's entry and frames (uint8 [bytes])."""

    entry: DeltaEntry
    frames: torch.Tensor


def encode_tensor(
    old: torch.Tensor, new: torch.Tensor, *, old_digest: str = "", threads: int = 1
) -> EncodedTensor:
    """Encodes `new` against `old`, CPU tensors of one dtype and shape, by the best codec.

    Args:
        old_digest: of `old`, where it is known.
    """
    a, b = frames.words(old), frames.words(new)
    codec = frames.choose(a, b, new.dtype)
    pieces = spread(
        lambda part: list(frames.encode(a[part], b[part], codec)),
        frames.parts(b.size, threads),
        threads,
    )
    arrays = [np.frombuffer(piece, np.uint8) for part in pieces for piece in part]
    joined = torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *arrays]))
    old_digest = old_digest or digest(old)
    new_digest = old_digest if codec == "same" else digest(new)
    dtype = str(new.dtype).removeprefix("torch.")
    entry = DeltaEntry(codec, dtype, tuple(new.shape), old_digest, new_digest)
    return EncodedTensor(entry, joined)


def decode_tensor(
    name: str,
    encoded: EncodedTensor,
    old: torch.Tensor,
    *,
    threads: int = 1,
    verify_old: bool = False,
    memory: Memory = empty_like_host,
) -> torch.Tensor:
    """The new tensor, in memory of its own; `old` is contiguous, on the CPU.

    Args:
        verify_old: refuse a wrong `old` even where the frames alone give the right result.
        memory: allocates the new tensor.

    Raises ValueError where `old`, the frames or the result is not what was encoded.
    """
    entry = encoded.entry
    if str(old.dtype) != f"torch.{entry.dtype}" or tuple(old.shape) != entry.shape:
        raise ValueError(f"{name} has another shape or dtype in the anchor")
    if verify_old and not matches(old, entry.old):
        raise ValueError(_OTHER_OLD.format(name))
    new = memory(old)
    found = _decode(raw_bytes(encoded.frames).data, entry.codec, old, new, threads)
    if found != entry.new:
        # Only an error needs this second digest.
        culprit = _OTHER_OLD if not matches(old, entry.old) else "{} did not come back as it was"
        raise ValueError(culprit.format(name))
    return new


def _decode(
    data: memoryview, codec: str, old: torch.Tensor, new: torch.Tensor, threads: int
) -> str:
    """Writes `new`; returns its digest."""
    source, target = frames.words(old), frames.words(new)
    if threads == 1:
        # The digest reads each part while it is in the core's cache.
        running = RunningDigest()
        frames.decode(data, source, codec, target, running.update)
        return running.value()
    parts = frames.parts(target.size, threads)
    rows = zip(parts, frames.split(data, codec, parts), strict=True)
    spread(lambda row: frames.decode(row[1], source[row[0]], codec, target[row[0]]), rows, threads)
    return digest(new)


def write_delta(
    path: Path, anchor: str, tensors: Mapping[str, EncodedTensor], ops: FileOps = FILES
) -> None:
    """Writes a new file and does not flush it. Raises OSError where the disk refuses."""
    entries = {name: asdict(encoded.entry) for name, encoded in tensors.items()}
    metadata = {"format": FORMAT, "anchor": anchor, "tensors": json.dumps(entries)}
    encoded = {name: each.frames for name, each in tensors.items()}
    write_tensors(encoded, path, metadata, ops)


class DeltaFile:
    """An open differential.

    Attributes:
        anchor: the id of its anchor.
        entries: by the tensors' names.
    """

    def __init__(self, path: Path, file: Any):
        self._path, self._file = path, file
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {str(metadata.get('format'))[:40]!r}")
        self.anchor = require_id(metadata.get("anchor", ""))
        described = json.loads(metadata.get("tensors", ""))
        if not isinstance(described, dict) or described.keys() != set(file.keys()):
            raise ValueError("its tensors are not those that it describes")
        self.entries = {name: _parse_entry(name, entry) for name, entry in described.items()}

    def decode(
        self,
        name: str,
        old: torch.Tensor,
        threads: int = 1,
        memory: Memory = empty_like_host,
    ) -> torch.Tensor:
        """The new tensor, in memory of its own.

        Args:
            old: the anchor's tensor, contiguous, on the CPU.
            memory: allocates the new tensor.

        Raises DataLoss where the anchor, the frames or the result is not what was written.
        """
        with corrupt_refused(f"The snapshot file {self._path.name}"):
            encoded = EncodedTensor(self.entries[name], self._file.get_tensor(name))
            return decode_tensor(name, encoded, old, threads=threads, memory=memory)


@contextmanager
def open_delta(path: Path, ops: FileOps = FILES) -> Iterator[DeltaFile]:
    """Opens a differential. Raises DataLoss where it is not whole; it is left as it is."""
    what = f"The snapshot file {path.name}"
    with corrupt_refused(what):
        file = ops.tensors(path)
    with file:
        with corrupt_refused(what):
            delta = DeltaFile(path, file)
        yield delta


def is_id(value: Any) -> bool:
    """Whether this has the form of an id of an anchor or a snapshot."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def require_id(value: Any) -> str:
    """The id of an anchor or a snapshot. Raises ValueError where it has not the form of one."""
    if not is_id(value):
        raise ValueError(f"{str(value)[:40]!r} is no id")
    return str(value)


def _parse_entry(name: str, entry: Any) -> DeltaEntry:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:40]!r} is no parameter's name")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"what it says of {name} is not whole")
    shape, dtype = entry["shape"], DTYPES.get(str(entry["dtype"]))
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"the shape of {name} is none")
    if dtype is None:
        raise ValueError(f"the dtype of {name} is {str(entry['dtype'])[:40]!r}")
    frames.require_suitable(str(entry["codec"]), dtype)
    for key in ("old", "new"):
        algorithm_of(str(entry[key]))
    if entry["codec"] == "same" and entry["old"] != entry["new"]:
        raise ValueError(f"{name} is the same, with two digests")
    return DeltaEntry(entry["codec"], entry["dtype"], tuple(shape), entry["old"], entry["new"])


@contextmanager
def corrupt_refused(what: str) -> Iterator[None]:
    """Turns the errors of reading a damaged file into DataLoss; `what` begins its message."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise DataLoss(
            f"{what} cannot be used ({error}); it was left as it is, and nothing else was changed. "
            "Choose another snapshot, or delete this one.",
            reason="SNAPSHOT_CORRUPT",
        ) from error
