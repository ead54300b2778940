"""The Apollo state on disk: one safetensors file, its JSON inside the header.

Tensors and their description are one file on purpose: two files that belong together could be
renamed one without the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.apollo_state.header import FORMAT
from apollo_trainer.checkpoints.disk import (
    DTYPES,
    FILES,
    FileOps,
    RunningDigest,
    TensorPlace,
    durable_write,
    parse_metadata,
    raw_bytes,
    read_header,
    write_tensors,
)
from apollo_trainer.checkpoints.host_memory import Memory

_PIECE = 2**19


def save_state(path: Path, tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> int:
    """Writes the state durably; returns its bytes. Raises OSError with the old file kept."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return durable_write(path, lambda new: write_state(new, tensors, description))


def write_state(
    path: Path,
    tensors: dict[str, torch.Tensor],
    description: dict[str, Any],
    ops: FileOps = FILES,
) -> None:
    """Writes a new file; it is not flushed. Raises OSError when the disk refuses."""
    metadata = {"format": FORMAT, "description": json.dumps(description, allow_nan=False)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(contiguous, path, metadata, ops)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The state in `path`, or None where there is no file.

    Raises FailedPrecondition for a file that is not a whole state; it is left as it is.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(  # noqa: SIM118
                metadata["description"]
            )
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise FailedPrecondition(
            f"The Apollo state {path} cannot be read ({error}); it was left as it is. Move it away "
            "to begin with a new state.",
            reason="STATE_UNREADABLE",
        ) from error


def read_state(
    path: Path, expected: str, memory: Memory, ops: FileOps = FILES
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of a file, which is read once, in memory that may be written to.

    Args:
        expected: the digest of the file.
        memory: of the tensors.

    Raises ValueError for another file, and OSError.
    """
    header, running, tensors = read_header(ops, path), RunningDigest(), {}
    running.update(np.frombuffer(header.raw, np.uint8))
    with ops.opened(path) as file:
        # As they lie in it: the digest is of the file.
        for name, place in sorted(header.tensors.items(), key=lambda item: item[1].start):
            tensors[name] = memory(_like(name, place))
            _read(ops, file, place.start, raw_bytes(tensors[name]), running)
    metadata = parse_metadata(header.raw) or {}
    if running.value() != expected or metadata.get("format") != FORMAT:
        raise ValueError("its Apollo state is not what was written")
    return tensors, json.loads(metadata["description"])


def _like(name: str, place: TensorPlace) -> torch.Tensor:
    try:
        return torch.empty(place.shape, dtype=DTYPES[place.dtype], device="meta")
    except RuntimeError as error:
        # Without a byte, it may have any shape.
        raise ValueError(f"{name!r} has a shape that no tensor has") from error


def _read(
    ops: FileOps, file: int, offset: int, target: NDArray[np.uint8], running: RunningDigest
) -> None:
    """Piece by piece, so that the digest finds each in the core's cache."""
    for start in range(0, target.size, _PIECE):
        piece = target[start : start + _PIECE]
        ops.read_all(file, piece.data, offset + start)
        running.update(piece)
