"""Copy-on-write snapshots: training goes on while the model is copied.

Weights change in optimizer steps alone. A copy begins between two steps and goes on in the
background; a parameter that the next step writes before it is copied, the step copies first.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apollo_grpc.errors import Aborted
from apollo_trainer.checkpoints.directory import Progress
from apollo_trainer.checkpoints.host_memory import DeviceEvent, HostBuffers, StagingCopy
from apollo_trainer.checkpoints.snapshots.model_state import ModelState, moments_of
from apollo_trainer.checkpoints.snapshots.snapshot_info import SnapshotInfo
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.optim import Apollo


class _Pending:
    """One parameter and its moments, until they are copied."""

    def __init__(self, name: str, parameter: Tensor, moments: Mapping[str, Tensor]):
        self.name, self.tensors, self.moments = name, [parameter, *moments.values()], list(moments)
        self.versions = self.versions_now()
        self.lock, self.begun = threading.Lock(), False
        self.copies: list[StagingCopy] = []

    def versions_now(self) -> list[int]:
        """torch's counts of writes to the tensors."""
        return [tensor._version for tensor in self.tensors]


class SnapshotCopy:
    """A copy of the model as it is when this is constructed: between two steps.

    Whoever writes a parameter calls `before_write` first. Host memory: the bytes of the weights
    and of the state.

    Args:
        extra: kept with the state; what JSON can hold.
        buffers: allocates the host memory; `give_back` returns it.

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
        # By parameter.
        self._pending = {
            id(parameter): _Pending(name, parameter, moments_of(optimizer, name, parameter))
            for name, parameter in parameters.items()
        }
        self._buffers = buffers or HostBuffers(keeps=False)
        self._device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self._begun = DeviceEvent(self._device.type == "cuda")
        self._error: Exception | None = None
        self.copied_by_writers = 0
        self._thread = threading.Thread(target=self._copy_all, name="snapshot-copy", daemon=True)

    def start(self) -> SnapshotCopy:
        """Begins to copy in the background."""
        self._thread.start()
        return self

    def before_write(self, parameter: Tensor) -> None:
        """Copies the parameter and its moments unless they are copied. On the writer's thread."""
        if pending := self._pending.get(id(parameter)):
            self.copied_by_writers += self._copy(pending, waits=False)

    def state(self) -> ModelState:
        """The complete copy; waits for it, or makes it where `start` was not called.

        Raises Aborted where a parameter was written without `before_write`.
        """
        if self._thread.ident is None:
            self._copy_all()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        for pending in self._pending.values():
            parameter, *moments = [each.tensor() for each in pending.copies]
            self._state.parameters[pending.name] = parameter
            self._state.moments |= zip(pending.moments, moments, strict=True)
        return self._state

    def give_back(self) -> None:
        """Returns the memory of `state` to the buffers, for the next copy."""
        if self._thread.ident is not None:
            self._thread.join()
        copies = [each.tensor() for p in self._pending.values() for each in p.copies]
        self._buffers.keep_only(*copies)
        for pending in self._pending.values():
            pending.copies.clear()

    def write_to(
        self, store: SnapshotStore, name: str = "", progress: Progress = lambda *_: None
    ) -> SnapshotInfo:
        """Writes the copy as a snapshot, then gives its memory back. Raises as `store.create`."""
        try:
            return store.create(self, name, progress)
        finally:
            self.give_back()

    def _copy_all(self) -> None:
        try:
            with self._begun.in_stream_after(self._device):
                for pending in self._pending.values():
                    self._copy(pending, waits=True)
        except Exception as error:
            self._error = self._error or error

    def _copy(self, pending: _Pending, *, waits: bool) -> bool:
        """Returns whether it copied. Keeps errors for `state`: a step goes on.

        Args:
            waits: until a device has made the copy, so that the lock holds back the step. A step
                need not wait for its own copy: the device makes it before it writes.
        """
        with pending.lock:
            if pending.begun:
                return False
            pending.begun = True
            try:
                for tensor in pending.tensors:
                    pending.copies.append(StagingCopy.of(tensor, self._buffers))
                if waits:
                    pending.copies[-1].tensor()
                if pending.versions_now() != pending.versions:
                    raise Aborted(
                        f"{pending.name} was changed while the snapshot was taken; no snapshot "
                        "was written. Try again.",
                        reason="SNAPSHOT_OVERTAKEN",
                    )
            except Exception as error:
                self._error = self._error or error
            return True
