"""The optimizer's state on disk: one safetensors file, and whose weights it belongs to.

The description of the tensors is JSON inside the same file: of two files, a crash could leave one
new and one old.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from apollo_grpc.errors import FailedPrecondition
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

FORMAT = "apollo-state-1"
FILE_NAME = "apollo_state.safetensors"
# The state in the middle of a run: of use only with the engine that is being trained.
RUNNING_FILE_NAME = "apollo_state.running.safetensors"
# Keys of the description.
OPTIMIZER_KEY, SHAPE_KEY, WEIGHTS_KEY = "optimizer", "shape", "weights"
# Bytes that are read at once: they stay in the core's cache for the digest.
_PIECE = 2**19


@dataclass(frozen=True)
class Covered:
    """The last run in the ledger that a state includes, and how many of its steps.

    The ledger may count more: an undo or a restore took them back, and nobody is to add them again.
    """

    run_id: str = ""
    steps: int = 0


@dataclass(frozen=True)
class StateOf:
    """The weights that a state belongs to.

    Attributes:
        epoch: of the engine that had these weights.
        fingerprint: of the weights; empty for a state in the middle of a run.
        saves: rises by one with each save of this model's state.
        covered: the runs that the state includes.
    """

    epoch: str = ""
    fingerprint: str = ""
    saves: int = 0
    covered: Covered = Covered()

    @classmethod
    def read(cls, description: dict[str, Any]) -> StateOf:
        """Parses a description; what it lacks has the default."""
        found = description.get(WEIGHTS_KEY, {})
        covered = found.get("covered", {})
        return cls(
            str(found.get("epoch", "")),
            str(found.get("fingerprint", "")),
            int(found.get("saves", 0)),
            Covered(str(covered.get("run_id", "")), int(covered.get("steps", 0))),
        )


def state_of(path: Path) -> StateOf:
    """The weights that the state in a file belongs to; the default where it cannot be read."""
    return StateOf.read(_description(path) or {})


def newest_state(folder: Path, epoch: str) -> Path:
    """The file of the last state that was saved beside an engine, else that of the last run."""
    running, final = folder / RUNNING_FILE_NAME, folder / FILE_NAME
    found, last = state_of(running), state_of(final)
    superseded = last.epoch == epoch and last.saves > found.saves
    return running if found.epoch == epoch and not superseded else final


def saved_steps(state_dir: Path, epoch: str) -> int | None:
    """Optimizer steps of the state on disk that belongs to an engine; None where there is none."""
    for folder in (state_dir / "models").glob("*"):
        state = _description(newest_state(folder, epoch)) or {}
        if StateOf.read(state).epoch == epoch:
            return int(state[OPTIMIZER_KEY]["step_count"])
    return None


def _description(path: Path) -> dict[str, Any] | None:
    """The description of a state, without its tensors; None where it cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            description: dict[str, Any] = json.loads((file.metadata() or {})["description"])
            return description
    except (SafetensorError, ValueError, KeyError, OSError):
        return None


def save_state(path: Path, tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> int:
    """Replaces the file durably; returns its bytes. Raises OSError with the old file kept."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return durable_write(path, lambda new: write_state(new, tensors, description))


def write_state(
    path: Path,
    tensors: dict[str, torch.Tensor],
    description: dict[str, Any],
    ops: FileOps = FILES,
) -> None:
    """Writes a new file and does not flush it. Raises OSError where the disk refuses."""
    metadata = {"format": FORMAT, "description": json.dumps(description, allow_nan=False)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(contiguous, path, metadata, ops)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The tensors and the description in a file; None where there is no file.

    Raises FailedPrecondition for a file that is not a whole state; it is left as it is.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(metadata["description"])
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise FailedPrecondition(
            f"The Apollo state {path} cannot be read ({error}); it was left as it is. Move it away "
            "to begin with a new state.",
            reason="STATE_UNREADABLE",
        ) from error


def read_state(
    path: Path, expected: str, memory: Memory, ops: FileOps = FILES
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, in memory that may be written to, and the description. Reads the file once.

    Args:
        expected: the digest of the file.
        memory: allocates the tensors.

    Raises ValueError where the file is another one, OSError where the disk refuses.
    """
    header, running, tensors = read_header(ops, path), RunningDigest(), {}
    running.update(np.frombuffer(header.raw, np.uint8))
    with ops.opened(path) as file:
        # In the file's order, which is the digest's.
        for name, place in sorted(header.tensors.items(), key=lambda item: item[1].start):
            tensors[name] = memory(_like(name, place))
            data = raw_bytes(tensors[name])
            for start in range(0, data.size, _PIECE):
                piece = data[start : start + _PIECE]
                ops.read_all(file, piece.data, place.start + start)
                running.update(piece)
    metadata = parse_metadata(header.raw) or {}
    if running.value() != expected or metadata.get("format") != FORMAT:
        raise ValueError("its Apollo state is not what was written")
    return tensors, json.loads(metadata["description"])


def _like(name: str, place: TensorPlace) -> torch.Tensor:
    try:
        return torch.empty(place.shape, dtype=DTYPES[place.dtype], device="meta")
    except RuntimeError as error:
        # A tensor of no bytes may claim any shape.
        raise ValueError(f"{name!r} has a shape that no tensor has") from error
