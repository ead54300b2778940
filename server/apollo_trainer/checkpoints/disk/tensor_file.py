"""Writes and reads the bytes of safetensors files, a bounded piece at a time.

safetensors.save_file can neither flush what it wrote nor be told to fail.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

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


def digest_of(data: bytes | memoryview) -> str:
    """XXH3 of 128 bits, in hex: whether bytes are as they were, not who wrote them."""
    return xxhash.xxh3_128_hexdigest(data)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major; a copy only where it lies otherwise."""
    flat = tensor.detach().contiguous().view(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array) if flat.numel() else memoryview(b"")


def write_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    metadata: dict[str, str] | None,
    ops: FileOps = FILES,
    pieces: Callable[[str], Iterable[memoryview]] | None = None,
) -> dict[str, str]:
    """Writes a new safetensors file, not flushed; returns the digest of each tensor.

    Args:
        tensors: on the CPU, or without values where `pieces` returns their bytes.

    Raises OSError when the disk refuses.
    """
    header = build_header(tensors, metadata)
    read = pieces or (lambda name: pieces_of(bytes_of(tensors[name])))
    file = ops.create(path, 0o666)
    try:
        ops.write_all(file, memoryview(header.raw), 0)
        return {
            name: write_pieces(ops, file, read(name), place.start)
            for name, place in header.tensors.items()
        }
    finally:
        ops.close(file)


def pieces_of(data: memoryview) -> Iterator[memoryview]:
    """Bytes, a bounded piece at a time."""
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def write_pieces(ops: FileOps, file: int, pieces: Iterable[memoryview], offset: int) -> str:
    """Writes bytes one after the other from an offset on, and returns their digest."""
    digest, begin = xxhash.xxh3_128(), offset
    for piece in pieces:
        digest.update(piece)
        ops.write_all(file, piece, offset)
        if offset + len(piece) - begin >= PIECE:
            ops.start_writing(file, len(piece), offset)
        offset += len(piece)
    return digest.hexdigest()


def digest_of_pieces(pieces: Iterable[memoryview]) -> str:
    """The digest of bytes that come one after the other."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def digest_at(
    ops: FileOps, file: int, place: TensorPlace, read: Callable[[int], None] = lambda size: None
) -> str:
    """The digest of bytes on disk; `read` is told of every piece."""
    digest = xxhash.xxh3_128()
    for piece in pieces_at(ops, file, place):
        digest.update(piece)
        read(len(piece))
    return digest.hexdigest()


def pieces_at(ops: FileOps, file: int, place: TensorPlace) -> Iterator[memoryview]:
    """The bytes of a tensor on disk. Raises OSError where the file ends before they do."""
    offset = place.start
    while offset < place.end:
        piece = ops.pread(file, min(PIECE, place.end - offset), offset)
        if not piece:
            raise OSError(errno.EIO, f"a file ends at byte {offset}, before its tensors do")
        yield memoryview(piece)
        offset += len(piece)


def read_header(ops: FileOps, path: Path) -> ShardHeader:
    """The header of a file. Raises ValueError where it is no safetensors file, and OSError."""
    size = ops.stat(path).st_size
    with ops.opened(path) as file:
        length = header_length(ops.pread(file, LENGTH.size, 0), size)
        return parse_header(ops.pread(file, length, 0), size)
