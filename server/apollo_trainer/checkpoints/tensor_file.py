"""Writes and reads the bytes of safetensors files, a bounded piece at a time.

safetensors.save_file can neither flush what it wrote nor be told to fail.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from apollo_trainer.checkpoints.file_ops import FILES, FileOps
from apollo_trainer.checkpoints.shard_header import (
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
    tensors: dict[str, torch.Tensor],
    path: Path,
    metadata: dict[str, str] | None,
    ops: FileOps = FILES,
    values: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, str]:
    """Writes a new safetensors file, not flushed; returns the digest of each tensor.

    Args:
        tensors: on the CPU, or without values where `values` returns them, one after the other.

    Raises OSError when the disk refuses.
    """
    header, read = build_header(tensors, metadata), values or tensors.__getitem__
    file = ops.create(path, 0o666)
    try:
        ops.write_all(file, memoryview(header.raw), 0)
        return {
            name: write_piecewise(ops, file, bytes_of(read(name)), place.start)
            for name, place in header.tensors.items()
        }
    finally:
        ops.close(file)


def write_piecewise(ops: FileOps, file: int, data: memoryview, offset: int) -> str:
    """Writes bytes at an offset, and returns their digest."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        digest.update(piece)
        ops.write_all(file, piece, offset + start)
        if len(data) >= PIECE:
            ops.start_writing(file, len(piece), offset + start)
    return digest.hexdigest()


def copy_piecewise(
    ops: FileOps, source: int, target: int, place: TensorPlace, further: int = 0
) -> str:
    """Copies bytes to another file, `further` behind their place; returns their digest."""
    digest, offset = xxhash.xxh3_128(), place.start + further
    for piece in _pieces(ops, source, place):
        digest.update(piece)
        ops.write_all(target, memoryview(piece), offset)
        offset += len(piece)
    return digest.hexdigest()


def digest_at(
    ops: FileOps, file: int, place: TensorPlace, read: Callable[[int], None] = lambda size: None
) -> str:
    """The digest of bytes on disk; `read` is told of every piece."""
    digest = xxhash.xxh3_128()
    for piece in _pieces(ops, file, place):
        digest.update(piece)
        read(len(piece))
    return digest.hexdigest()


def _pieces(ops: FileOps, file: int, place: TensorPlace) -> Iterator[bytes]:
    offset = place.start
    while offset < place.end:
        piece = ops.pread(file, min(PIECE, place.end - offset), offset)
        if not piece:
            raise OSError(errno.EIO, f"a file ends at byte {offset}, before its tensors do")
        yield piece
        offset += len(piece)


def read_header(ops: FileOps, path: Path) -> ShardHeader:
    """The header of a file. Raises ValueError where it is no safetensors file, and OSError."""
    size = ops.stat(path).st_size
    with ops.opened(path) as file:
        length = header_length(ops.pread(file, LENGTH.size, 0), size)
        return parse_header(ops.pread(file, length, 0), size)
