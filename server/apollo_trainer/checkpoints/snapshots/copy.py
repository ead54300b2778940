"""Snapshots while training goes on: nothing is copied under the step lock.

Weights change in optimizer steps alone. A copy begins between two steps and goes on during the next
forward and backward; what the step comes to before it was copied, the step copies first.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apollo_grpc.errors import Aborted
from apollo_trainer.checkpoints.directory import Progress
from apollo_trainer.checkpoints.host_memory import HostBuffers, Reached, StagedCopy, beside
from apollo_trainer.checkpoints.snapshots.model_state import ModelState, moments_of
from apollo_trainer.checkpoints.snapshots.snapshot_info import SnapshotInfo
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.optim import Apollo


@dataclass
class _Pending:
    """One parameter that is yet to be copied, and its moments, with their versions."""

    name: str
    parameter: Tensor
    moments: dict[str, Tensor]
    versions: list[int]
    lock: threading.Lock = field(default_factory=threading.Lock)
    copies: list[StagedCopy] = field(default_factory=list)
    begun: bool = False

    def tensors(self) -> list[Tensor]:
        return [self.parameter, *self.moments.values()]


class SnapshotCopy:
    """A copy of the model as it is when this is constructed: between two steps, under their lock.

    Whoever writes parameters calls `before_write` for each one first. Host memory: the bytes of
    the weights and of the state.

    Args:
        buffers: where the host memory comes from, and goes to at `give_back`.

    Raises RuntimeError in the middle of a step.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: Apollo,
        extra: dict[str, Any] | None = None,
        buffers: HostBuffers | None = None,
    ):
        _, description = optimizer.named_state()
        self._state = ModelState({}, {}, copy.deepcopy(description), copy.deepcopy(extra or {}))
        self._pending = []
        for name, parameter in parameters.items():
            moments = moments_of(optimizer, name, parameter)
            versions = [t._version for t in (parameter, *moments.values())]
            self._pending.append(_Pending(name, parameter, moments, versions))
        self._buffers = buffers or HostBuffers(keeps=False)
        self._device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self._begun = Reached(self._device.type == "cuda")
        self._by_id = {id(p.parameter): p for p in self._pending}
        self._error: Exception | None = None
        self.copied_by_writers = 0
        self._thread = threading.Thread(target=self._copy_all, name="snapshot-copy", daemon=True)

    def start(self) -> SnapshotCopy:
        """Begins to copy in the background."""
        self._thread.start()
        return self

    def before_write(self, parameter: Tensor) -> None:
        """Copies the parameter and its moments now, unless that was done."""
        if pending := self._by_id.get(id(parameter)):
            self.copied_by_writers += self._copy(pending, waits=False)

    def state(self) -> ModelState:
        """The complete copy; waits for it.

        Raises Aborted where a parameter was written and `before_write` was not called.
        """
        if self._thread.ident is None:
            self._copy_all()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        for pending in self._pending:
            parameter, *moments = [each.tensor() for each in pending.copies]
            self._state.parameters[pending.name] = parameter
            self._state.moments |= zip(pending.moments, moments, strict=True)
        return self._state

    def give_back(self) -> None:
        """Ends the use of what `state` returned: its memory is for the next copy."""
        if self._thread.ident is not None:
            self._thread.join()
        copies = [each for pending in self._pending for each in pending.copies]
        self._buffers.keep_only(*(each.tensor() for each in copies))
        for pending in self._pending:
            pending.copies.clear()

    def _copy_all(self) -> None:
        try:
            with beside(self._begun, self._device):
                for pending in self._pending:
                    self._copy(pending, waits=True)
        except Exception as error:
            self._error = self._error or error

    def _copy(self, pending: _Pending, *, waits: bool) -> bool:
        """Returns whether it was copied now. Errors are `state`'s to raise: a step goes on.

        Args:
            waits: until a device has made the copy. The lock keeps the step from writing meanwhile;
                what the step copies itself, the device does before it writes.
        """
        with pending.lock:
            if pending.begun:
                return False
            pending.begun = True
            try:
                for tensor in pending.tensors():
                    pending.copies.append(StagedCopy(tensor, self._buffers))
                if waits:
                    pending.copies[-1].tensor()
                if [t._version for t in pending.tensors()] != pending.versions:
                    raise Aborted(
                        f"{pending.name} was changed while the snapshot was taken; no snapshot "
                        "was written. Try again.",
                        reason="SNAPSHOT_OVERTAKEN",
                    )
            except Exception as error:
                self._error = self._error or error
            return True


Done = Callable[[Future[SnapshotInfo]], None]


class SnapshotWriter:
    """Encodes and writes snapshots on a thread of its own, one after the other."""

    def __init__(self, store: SnapshotStore):
        self._store = store
        self._pool = ThreadPoolExecutor(1, "snapshot-writer")

    def write(
        self,
        source: SnapshotCopy,
        name: str = "",
        progress: Progress = lambda *_: None,
    ) -> Future[SnapshotInfo]:
        """Ends when the snapshot is durable, or with what `SnapshotStore.create` raises."""

        def create() -> SnapshotInfo:
            try:
                return self._store.create(source, name, progress)
            finally:
                source.give_back()

        return self._pool.submit(create)

    def stop(self) -> None:
        """Ends once all that waits is written."""
        self._pool.shutdown()
