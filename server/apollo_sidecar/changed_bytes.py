"""Bytes of the live weights that a probe changes for a moment, and the copies that put them back.

The copies lie in vLLM's own process: whoever asked for the change may die.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.live_weights import LiveWeights

# A probe changes a few rows of each tensor; more would be kept twice for no better proof.
MAX_CHANGED_BYTES = 256 << 20


class _Place(NamedTuple):
    """Runs of elements in a buffer, which is seen whole as one row of a dtype."""

    flat: torch.Tensor
    starts: torch.Tensor
    elements: int

    @property
    def where(self) -> torch.Tensor:
        """[runs, elements]; made anew each time, since it is larger than what it points at."""
        return self.starts[:, None] + torch.arange(self.elements, device=self.flat.device)

    @property
    def size_bytes(self) -> int:
        return len(self.starts) * self.elements * self.flat.element_size()

    def read(self) -> torch.Tensor:
        return self.flat[self.where]

    def write(self, values: torch.Tensor) -> None:
        self.flat[self.where] = values


class ChangedBytes:
    """At most one change at a time. Used on the worker's own thread, between forwards."""

    def __init__(self) -> None:
        self._kept: list[tuple[_Place, torch.Tensor]] = []

    def change(self, live: LiveWeights, changes: Iterable[pb.WeightChange]) -> None:
        """Adds seeded noise to the elements that the changes name, after `put_back`.

        Raises FailedPrecondition where one names no elements of a tensor of floats, or all of them
        together are too many; nothing is changed then.
        """
        self.put_back()
        asked = [(change, _place(live, change)) for change in changes]
        if sum(place.size_bytes for _, place in asked) > MAX_CHANGED_BYTES:
            raise _refusal(f"They are of more than {MAX_CHANGED_BYTES} bytes.")
        # All copies before the first write: two changes may meet in one tied tensor.
        self._kept = [(place, place.read()) for _, place in asked]
        for (change, place), (_, old) in zip(asked, self._kept, strict=True):
            generator = torch.Generator(old.device).manual_seed(change.seed)
            noise = torch.randn(old.shape, generator=generator, device=old.device)
            place.write((old + change.deviation * noise).to(old.dtype))

    def put_back(self) -> None:
        """Makes the bytes what they were before the change; nothing where none is changed.

        Raises FailedPrecondition where they are not, bit for bit: the copies are then kept.
        """
        for place, old in self._kept:
            place.write(old)
        for place, old in self._kept:
            if not torch.equal(place.read().view(torch.uint8), old.view(torch.uint8)):
                raise FailedPrecondition(
                    "The weights that a probe changed could not be put back; vLLM stays paused. "
                    "Restart vLLM.",
                    reason="PROBE_NOT_UNDONE",
                )
        self._kept = []


def _place(live: LiveWeights, change: pb.WeightChange) -> _Place:
    tensor = next((t for t in live.tensors if t.name == change.tensor), None)
    if tensor is None or not tensor.dtype.is_floating_point:
        raise _refusal(f"{change.tensor} is no tensor of floats.")
    first, width = list(change.offset_bytes), tensor.dtype.itemsize
    if not first or change.elements <= 0 or any((o - tensor.offset_bytes) % width for o in first):
        raise _refusal(f"They name no whole elements of {change.tensor}.")
    if min(first) < tensor.offset_bytes or max(first) + change.elements * width > tensor.end_bytes:
        raise _refusal(f"They lie outside {change.tensor}.")
    storage = live.storages[tensor.buffer_id]
    flat = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    flat.set_(storage, 0, (storage.nbytes() // tensor.dtype.itemsize,), (1,))
    starts = torch.tensor(first, device=storage.device) // tensor.dtype.itemsize
    return _Place(flat, starts, change.elements)


def _refusal(what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The changes of a probe are refused: {what} Nothing was changed.", reason="PROBE_INVALID"
    )
