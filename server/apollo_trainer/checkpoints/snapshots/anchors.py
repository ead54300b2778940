"""Anchors: full weights that snapshots are differences to, and the encoding against them."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from apollo_grpc.errors import DataLoss
from apollo_trainer.checkpoints.disk import (
    FILES,
    FileOps,
    StoreFolder,
    spread_by_size,
    threads_for,
    write_tensors,
)
from apollo_trainer.checkpoints.host_memory import Memory
from apollo_trainer.checkpoints.snapshots.delta_file import (
    EncodedTensor,
    encode_tensor,
    open_delta,
)
from apollo_trainer.checkpoints.snapshots.model_state import ModelState

FORMAT, FILE_NAME = "apollo-anchor-2", "weights.safetensors"
# Above it a new anchor is cheaper: it makes the next differentials small again.
MOST_OF_THE_BYTES = 0.45


class Anchors:
    """The anchors of one state folder."""

    def __init__(self, root: Path, ops: FileOps = FILES):
        self.folder, self._ops = StoreFolder(root, "anchors", ops), ops

    def path(self, anchor: str) -> Path:
        """The file of an anchor."""
        return self.folder.path / anchor / FILE_NAME

    def create(self, state: ModelState) -> str:
        """Writes a new anchor durably; returns its id. Raises OSError with nothing left of it."""
        digests = {name: state.digest(name) for name in state.parameters}
        metadata = {"format": FORMAT, "digests": json.dumps(digests)}
        with self.folder.building() as (new, folder):
            write_tensors(state.parameters, folder / FILE_NAME, metadata, self._ops)
            self.folder.publish(new)
        return new

    def newest_for(self, state: ModelState) -> str:
        """The newest anchor of such parameters; empty where there is none."""
        for anchor in reversed(self.folder.ids()):
            if self._fits(anchor, state.parameters):
                return anchor
        return ""

    def _fits(self, anchor: str, parameters: Mapping[str, torch.Tensor]) -> bool:
        try:
            with self._ops.tensors(self.path(anchor)) as file:
                known = (file.metadata() or {}).get("format") == FORMAT
                if not known or set(file.keys()) != parameters.keys():
                    return False
                return all(
                    file.get_slice(name).get_shape() == list(p.shape)
                    and file.get_tensor(name).dtype == p.dtype
                    for name, p in parameters.items()
                )
        except (OSError, SafetensorError):
            return False

    def encode(
        self, anchor: str, state: ModelState, threads: int = 1
    ) -> dict[str, EncodedTensor] | None:
        """The differential to an anchor; None where it is above MOST_OF_THE_BYTES."""
        sizes = {name: p.nbytes for name, p in state.parameters.items()}
        room = _Room(MOST_OF_THE_BYTES * sum(sizes.values()))
        with self._ops.tensors(self.path(anchor)) as file:
            digests = _digests(file)

            def encode(name: str, threads: int) -> EncodedTensor:
                encoded = encode_tensor(
                    file.get_tensor(name),
                    state.parameters[name],
                    old_digest=digests.get(name, ""),
                    threads=threads,
                )
                room.take(encoded.frames.nbytes)
                return encoded

            try:
                encoded = spread_by_size(encode, sizes, threads)
            except _NoRoomError:
                return None
        state.digests.update({name: each.entry.new for name, each in encoded.items()})
        return encoded

    def decode(
        self, path: Path, anchor: str, digests: Mapping[str, str], memory: Memory
    ) -> dict[str, torch.Tensor]:
        """The weights of a differential.

        Args:
            digests: of the weights, which the differential's must be.
            memory: of the weights.

        Raises DataLoss where anything is not as it was, ValueError where its digests are others.
        """
        try:
            file = self._ops.tensors(self.path(anchor))
        except (OSError, SafetensorError) as error:
            raise DataLoss(
                f"The anchor {anchor} cannot be read ({error}), so no snapshot that is a "
                "difference to it can be restored; nothing was changed. Choose another snapshot.",
                reason="SNAPSHOT_CORRUPT",
            ) from error
        with file, open_delta(path, self._ops) as delta:
            names = set(file.keys())
            if delta.anchor != anchor or names != delta.entries.keys():
                raise DataLoss(
                    f"The snapshot file {path.name} is no difference to the anchor {anchor}; "
                    "nothing was changed. Choose another snapshot.",
                    reason="SNAPSHOT_CORRUPT",
                )

            # It verifies each one by its own digests; these say that it is this snapshot's.
            if any(digests.get(n) != entry.new for n, entry in delta.entries.items()):
                raise ValueError("its differential is of another snapshot")

            def decode(name: str, threads: int) -> torch.Tensor:
                return delta.decode(name, file.get_tensor(name), threads, memory)

            anchored = {name: file.get_tensor(name).nbytes for name in delta.entries}
            return spread_by_size(decode, anchored, threads_for(sum(anchored.values())))


class _NoRoomError(Exception):
    """More bytes were taken than there were."""


class _Room:
    """Bytes that threads take from."""

    def __init__(self, size: float):
        self._left, self._lock = size, threading.Lock()

    def take(self, size: int) -> None:
        """Raises _NoRoomError where they are used up."""
        with self._lock:
            self._left -= size
            if self._left < 0:
                raise _NoRoomError


def _digests(file: Any) -> dict[str, str]:
    """What the anchor says of its own tensors; a wrong one is found when it is decoded."""
    try:
        digests = json.loads((file.metadata() or {}).get("digests", ""))
    except ValueError:
        return {}
    return digests if isinstance(digests, dict) else {}
