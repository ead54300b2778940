"""Anchors: full weights on disk. Snapshots are encoded as differences to them."""

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
# A larger differential costs more than a new anchor, which makes the next ones small again.
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
        """The newest anchor of parameters of these names, shapes and dtypes; empty for none."""
        fitting = (a for a in reversed(self.folder.ids()) if self._fits(a, state.parameters))
        return next(fitting, "")

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
        room, lock = MOST_OF_THE_BYTES * sum(sizes.values()), threading.Lock()
        with self._ops.tensors(self.path(anchor)) as file:
            digests = _digests(file)

            def encode(name: str, threads: int) -> EncodedTensor:
                nonlocal room
                old, new = file.get_tensor(name), state.parameters[name]
                digest = digests.get(name, "")
                encoded = encode_tensor(old, new, old_digest=digest, threads=threads)
                with lock:
                    room -= encoded.frames.nbytes
                    if room < 0:
                        raise _TooLargeError
                return encoded

            try:
                encoded = spread_by_size(encode, sizes, threads)
            except _TooLargeError:
                return None
        state.digests.update({name: each.entry.new for name, each in encoded.items()})
        return encoded

    def decode(
        self, path: Path, anchor: str, digests: Mapping[str, str], memory: Memory
    ) -> dict[str, torch.Tensor]:
        """The weights of the differential in a file.

        Args:
            digests: of the weights, by which the snapshot knows them.
            memory: allocates the weights.

        Raises DataLoss where a file is damaged, ValueError where the differential is another's.
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
            if delta.anchor != anchor or set(file.keys()) != delta.entries.keys():
                raise DataLoss(
                    f"The snapshot file {path.name} is no difference to the anchor {anchor}; "
                    "nothing was changed. Choose another snapshot.",
                    reason="SNAPSHOT_CORRUPT",
                )
            # It is verified by its own digests, which could be another snapshot's.
            if any(digests.get(n) != entry.new for n, entry in delta.entries.items()):
                raise ValueError("its differential is of another snapshot")

            def decode(name: str, threads: int) -> torch.Tensor:
                return delta.decode(name, file.get_tensor(name), threads, memory)

            anchored = {name: file.get_tensor(name).nbytes for name in delta.entries}
            return spread_by_size(decode, anchored, threads_for(sum(anchored.values())))


class _TooLargeError(Exception):
    """A differential is above MOST_OF_THE_BYTES."""


def _digests(file: Any) -> dict[str, str]:
    """The digests in an anchor's header; a wrong one is found when its tensor is decoded."""
    try:
        digests = json.loads((file.metadata() or {}).get("digests", ""))
    except ValueError:
        return {}
    return digests if isinstance(digests, dict) else {}
