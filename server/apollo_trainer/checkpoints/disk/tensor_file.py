"""Writes and reads the bytes of safetensors files, a bounded piece at a time.

safetensors.save_file can neither flush what it wrote nor be told to fail.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from apollo_trainer.checkpoints.disk.digests import RunningDigest, hex_digest, raw_bytes
from apollo_trainer.checkpoints.disk.file_ops import FILES, FileOps
from apollo_trainer.checkpoints.disk.shard_header import (
    LENGTH,
    ShardHeader,
    TensorPlace,
    build_header,
    header_length,
    parse_header,
)

# Bytes that are written or read at one time.
PIECE = 16 << 20


def write_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    metadata: dict[str, str] | None,
    ops: FileOps = FILES,
    pieces: Callable[[str], Iterable[memoryview]] | None = None,
) -> dict[str, str]:
    """Writes a new safetensors file, not flushed; returns each tensor's hex digest.

    Args:
        tensors: on the CPU, or without values where `pieces` returns their bytes.

    Raises OSError when the disk refuses.
    """
    header = build_header(tensors, metadata)
    read = pieces or (lambda name: pieces_of(tensors[name]))
    with ops.created(path, 0o666) as file:
        ops.write_all(file, memoryview(header.raw), 0)
        return {
            name: write_pieces(ops, file, read(name), place.start)
            for name, place in header.tensors.items()
        }


def write_pieces(ops: FileOps, file: int, pieces: Iterable[memoryview], offset: int) -> str:
    """Writes bytes one after the other from an offset on; returns their hex digest."""
    running, begin = RunningDigest(), offset
    for piece in pieces:
        running.update(piece)
        ops.write_all(file, piece, offset)
        if offset + len(piece) - begin >= PIECE:
            ops.start_writing(file, len(piece), offset)
        offset += len(piece)
    return running.hex()


def pieces_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a CPU tensor, row-major, in pieces. Copies only what is not contiguous."""
    data = raw_bytes(tensor).data
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def pieces_at(ops: FileOps, file: int, place: TensorPlace) -> Iterator[memoryview]:
    """The bytes of a tensor on disk, in pieces. Raises OSError where the file is too short."""
    offset = place.start
    while offset < place.end:
        piece = ops.pread(file, min(PIECE, place.end - offset), offset)
        if not piece:
            raise OSError(errno.EIO, f"a file ends at byte {offset}, before its tensors do")
        yield memoryview(piece)
        offset += len(piece)


def digest_at(ops: FileOps, file: int, place: TensorPlace) -> str:
    """The hex digest of a tensor on disk. Raises as `pieces_at`."""
    return hex_digest(pieces_at(ops, file, place))


def read_header(ops: FileOps, path: Path) -> ShardHeader:
    """The header of a file. Raises ValueError where it is no safetensors file, and OSError."""
    size = ops.stat(path).st_size
    with ops.opened(path) as file:
        length = header_length(ops.pread(file, LENGTH.size, 0), size)
        return parse_header(ops.pread(file, length, 0), size)
