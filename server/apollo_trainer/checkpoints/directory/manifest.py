"""The manifest: what the model directory held after the last sync, and where.

It is the commit point. A second one of the next generation, `manifest.next.json`, is on disk while
a sync is at work, and says what the directory is to become.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from apollo_trainer.checkpoints.disk import DTYPES, TensorPlace, whole_numbers
from apollo_trainer.weights.loaded_files import SUFFIX

FORMAT = "apollo-manifest-2"
_DIGEST = re.compile(r"[0-9a-f]{32}")
_LIMIT = 1 << 63


@dataclass(frozen=True)
class ShardRecord:
    """One shard as it was left: inode, size, time, and the hex digest of its header.

    `device` is kept for people: it may change with every boot, so that `is_at` ignores it.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    header: str

    def is_at(self, found: os.stat_result | None) -> bool:
        """Whether a file is the one that was left, and nobody has written to it since."""
        left = self.inode, self.size, self.mtime_ns
        return found is not None and (found.st_ino, found.st_size, found.st_mtime_ns) == left

    @classmethod
    def of(cls, found: os.stat_result, header: str) -> ShardRecord:
        """The record of a file that is on disk."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, header)


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: its place, and the hex digest of its bytes.

    Attributes:
        version: of the live tensor when it was written here.
    """

    shard: str
    place: TensorPlace
    version: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """A model directory's safetensors at one generation.

    Attributes:
        generation: goes up with every sync that changed anything.
        model: name of the directory.
        method: how this generation came about.
        written: shards that were replaced or written to for it.
    """

    generation: int
    model: str
    method: str
    written: tuple[str, ...]
    shards: Mapping[str, ShardRecord]
    tensors: Mapping[str, TensorRecord]

    def tensors_of(self, shard: str) -> dict[str, TensorRecord]:
        """The tensors of one shard, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.shard == shard}

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                **vars(self),
                "shards": {name: vars(shard) for name, shard in self.shards.items()},
                "tensors": {
                    name: [
                        t.shard,
                        t.place.dtype,
                        t.place.shape,
                        t.place.start,
                        t.version,
                        t.digest,
                    ]
                    for name, t in self.tensors.items()
                },
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Reads JSON. Raises ValueError for anything that `encode` does not write."""
        return _decoded(data)


# The last one, and what is to follow it: where nothing changed, most of a sync was to parse them.
@lru_cache(maxsize=2)
def _decoded(data: bytes) -> Manifest:
    try:
        return _manifest(json.loads(data.decode()))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it lacks something or holds too much ({error})") from error


def is_shard_name(name: Any) -> bool:
    """Whether `name` is that of a safetensors file in the directory itself."""
    return (
        isinstance(name, str)
        and name.endswith(SUFFIX)
        and not name.startswith(".")
        and not {"/", "\\", "\0"} & set(name)
        and len(name.encode(errors="replace")) <= 255
    )


def _manifest(content: Any) -> Manifest:
    expected = {"format", "generation", "model", "method", "written", "shards", "tensors"}
    _require(content.keys() == expected, "its keys are others")
    _require(content["format"] == FORMAT, f"its format is {content['format']!r}")
    model, method = content["model"], content["method"]
    _require(isinstance(model, str) and isinstance(method, str), "a name is no text")
    _require(whole_numbers([content["generation"]]), "its generation is no whole number")
    shards = {name: _shard(name, shard) for name, shard in content["shards"].items()}
    tensors = {name: _tensor(name, t, shards) for name, t in content["tensors"].items()}
    written = content["written"]
    known = isinstance(written, list) and all(isinstance(w, str) and w in shards for w in written)
    _require(known and len(set(written)) == len(written), "it wrote shards that it does not have")
    _require_apart(tensors)
    return Manifest(content["generation"], model, method, tuple(written), shards, tensors)


def _shard(name: str, content: Any) -> ShardRecord:
    _require(is_shard_name(name), f"{name!r} is no name of a shard")
    numbers = [content[key] for key in ("device", "inode", "size")]
    _require(whole_numbers(numbers), f"{name!r}: a number is none")
    time = content["mtime_ns"]
    _require(type(time) is int and -_LIMIT < time < _LIMIT, f"{name!r}: its time is none")
    _require(_is_digest(content["header"]), f"{name!r}: its digest is none")
    return ShardRecord(**content)


def _tensor(name: str, content: Any, shards: Mapping[str, ShardRecord]) -> TensorRecord:
    _require(isinstance(content, list) and len(content) == 6, f"{name!r} is no tensor")
    shard, dtype, shape, start, version, digest = content
    _require(isinstance(shard, str) and shard in shards, f"{name!r}: its shard is unknown")
    _require(isinstance(dtype, str) and dtype in DTYPES, f"{name!r}: its dtype is unknown")
    _require(
        whole_numbers(shape) and whole_numbers([start, version]), f"{name!r}: a number is none"
    )
    _require(_is_digest(digest), f"{name!r}: its digest is none")
    end = start + math.prod(shape) * DTYPES[dtype].itemsize
    _require(end <= shards[shard].size, f"{name!r} ends after its shard does")
    return TensorRecord(shard, TensorPlace(dtype, tuple(shape), start, end), version, digest)


def _require_apart(tensors: Mapping[str, TensorRecord]) -> None:
    end_of: dict[str, int] = {}
    for name, tensor in sorted(tensors.items(), key=lambda t: (t[1].place.start, t[1].place.end)):
        _require(tensor.place.start >= end_of.get(tensor.shard, 0), f"{name!r} overlaps another")
        end_of[tensor.shard] = tensor.place.end


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
