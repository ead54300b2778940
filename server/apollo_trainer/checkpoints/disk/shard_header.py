"""The header of a safetensors file: which tensor lies where. Refuses whatever is malformed.

Format: https://github.com/huggingface/safetensors, README, "Format": eight bytes of little-endian
length, JSON, then the tensors without a gap.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from apollo_trainer.checkpoints.disk.digests import hex_digest

# The library's own limit.
MAX_HEADER_BYTES = 100_000_000
LENGTH = struct.Struct("<Q")
# In the library's order: it writes the last kind first, so that each tensor is aligned.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16,
    "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes lie in its file: from `start` to before `end`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start

    def outline(self) -> torch.Tensor:
        """A tensor of this dtype and shape, without values."""
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")


@dataclass(frozen=True)
class ShardHeader:
    """A header: its bytes with the eight of its length (`raw`), and the tensors by name."""

    raw: bytes
    tensors: Mapping[str, TensorPlace]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return max((place.end for place in self.tensors.values()), default=len(self.raw))

    @property
    def digest(self) -> str:
        """The hex digest of `raw`."""
        return hex_digest([self.raw])


def header_length(first: bytes, file_size: int) -> int:
    """Bytes of a header with its length, from the file's first eight. Raises ValueError."""
    if len(first) != LENGTH.size:
        raise ValueError("it is shorter than the length of its header")
    length = LENGTH.size + int(LENGTH.unpack(first)[0])
    if length > min(file_size, MAX_HEADER_BYTES):
        raise ValueError(f"its header is said to be of {length} bytes")
    return length


def parse_header(raw: bytes, file_size: int) -> ShardHeader:
    """The header of a file of `file_size` bytes. Raises ValueError where anything is wrong."""
    if header_length(raw[: LENGTH.size], file_size) != len(raw):
        raise ValueError("its header is cut off")
    try:
        content = json.loads(raw[LENGTH.size :].decode(), object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("its header is nested without end") from error
    if not isinstance(content, dict):
        raise ValueError("its header is no JSON object")
    content.pop("__metadata__", None)
    places = {name: _place(name, entry, len(raw)) for name, entry in content.items()}
    end = len(raw)
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != end:
            raise ValueError(f"the bytes of {name!r} overlap others or leave a gap")
        end = place.end
    if end != file_size:
        raise ValueError(f"its tensors end at byte {end} of {file_size}")
    return ShardHeader(raw, places)


def build_header(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None
) -> ShardHeader:
    """The header of these tensors, in the order in which the safetensors library has them.

    Raises ValueError for a dtype that the format does not have.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAME_OF:
            raise ValueError(f"{name}: safetensors has no {tensor.dtype}; nothing was written")
    for name, tensor in sorted(tensors.items(), key=lambda t: (-_RANK[t[1].dtype], t[0])):
        start, end = end, end + tensor.nbytes
        shape, offsets = list(tensor.shape), [start, end]
        content[name] = {"dtype": _NAME_OF[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH.size)
    raw = LENGTH.pack(len(text)) + text
    return parse_header(raw, len(raw) + end)


def parse_metadata(raw: bytes) -> dict[str, str] | None:
    """The metadata of a header, such as {"format": "pt"}; None where there is none."""
    found = json.loads(raw[LENGTH.size :].decode()).get("__metadata__")
    return found if isinstance(found, dict) else None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands in it twice")
    return content


def _place(name: str, entry: Any, header: int) -> TensorPlace:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r} is none of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not (whole_numbers(shape) and whole_numbers(offsets) and len(offsets) == 2):
        raise ValueError(f"shape or place of {name!r} are no lists of whole numbers")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"the bytes of {name!r} are not those of its shape")
    return TensorPlace(dtype, tuple(shape), header + start, header + end)


def whole_numbers(values: Any) -> bool:
    """Whether `values` is a list of whole numbers from 0 to 2**63 - 1."""
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values
    )
