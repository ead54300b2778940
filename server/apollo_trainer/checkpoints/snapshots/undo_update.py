"""One update in the undo ring: what it is recorded in, how it is encoded, and how it is taken back.

Old values are copied into buffers that are used again for every update: fresh memory would cost
several times the copy, at each step. What is kept for good is made of them in the background.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from apollo_trainer.checkpoints.disk import background_threads, spread_by_size, threads_for
from apollo_trainer.checkpoints.host_memory import HostBuffers, Reached, Staged, StagedCopy
from apollo_trainer.checkpoints.snapshots.delta_file import (
    EncodedTensor,
    decode_tensor,
    encode_tensor,
)
from apollo_trainer.checkpoints.snapshots.model_state import to_host


@dataclass
class Update:
    """What takes one update back."""

    description: dict[str, Any]
    moments: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, EncodedTensor] = field(default_factory=dict)

    def size_bytes(self) -> int:
        """Bytes of differences and old moments."""
        frames = sum(e.frames.nbytes for e in self.weights.values())
        return frames + sum(t.nbytes for t in self.moments.values())


class Recorded:
    """One parameter of an update, before it was written, and its moments.

    Args:
        old: its values then, contiguous on the CPU.
        buffers: where `old` and `moments` go when they are encoded; None where they stay.
        previous: the same parameter in the update before, where that is not encoded yet.
        digest: of the values after the update, where it is known.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        old: Staged,
        moments: Mapping[str, Staged],
        buffers: HostBuffers | None = None,
        previous: Recorded | None = None,
        digest: str = "",
    ):
        self.name, self._parameter, self._digest = name, parameter, digest
        self._old, self._moments, self._buffers = old, moments, buffers
        self._previous = previous
        self._after: Staged | None = None
        self._begun, self._lock = False, threading.Lock()
        self.encoded: Future[None] = Future()
        if previous is not None:
            previous.parameter_is_written(old)

    @classmethod
    def staged(
        cls,
        name: str,
        parameter: Tensor,
        moments: Mapping[str, Tensor],
        buffers: HostBuffers,
        previous: Recorded | None,
    ) -> Recorded:
        """Copies what is live now into buffers."""
        copies = {key: StagedCopy(tensor, buffers) for key, tensor in moments.items()}
        old = StagedCopy(parameter, buffers)
        return cls(name, parameter, old, copies, buffers, previous)

    def parameter_is_written(self, after: Staged | None = None) -> None:
        """Before the parameter is written again: waits only where it is needed as it is.

        Args:
            after: a copy of what it is now, which will do as well.
        """
        with self._lock:
            if after is not None and not self._begun:
                self._after = after
                return
        # What it raised is for the ring: no step fails because an update cannot be taken back.
        wait([self.encoded])

    def encode(self, update: Update, written: Reached) -> None:
        """Adds to the update what takes the parameter back; then the buffers are free.

        Args:
            written: the update; what is read before may be half of it.
        """
        try:
            if self._previous is not None:
                # Its new values are the old ones of this.
                wait([self._previous.encoded])
                self._previous = None
            with self._lock:
                self._begun = True
            written.wait()
            self._encode(update)
            self.encoded.set_result(None)
        except BaseException as error:
            self.encoded.set_exception(error)

    def _encode(self, update: Update) -> None:
        old, new = self._old.tensor(), self._new()
        threads = background_threads(old.nbytes)
        update.weights[self.name] = encode_tensor(
            new, old, old_digest=self._digest, threads=threads
        )
        for key, staged in self._moments.items():
            update.moments[key] = to_host(staged.tensor())
        if self._buffers is None:
            return
        self._buffers.give(old, *(staged.tensor() for staged in self._moments.values()))
        if self._after is None and new.data_ptr() != self._parameter.data_ptr():
            self._buffers.give(new)

    def _new(self) -> Tensor:
        """The values after the update, contiguous on the CPU."""
        if self._after is not None:
            return self._after.tensor()
        if not self._parameter.is_cuda and self._parameter.is_contiguous():
            return self._parameter.detach()
        return StagedCopy(self._parameter, self._buffers or HostBuffers()).tensor()


def weights_before(
    taken: Sequence[Update], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights before these updates, the newest first, and their digests.

    Raises ValueError where the parameters are not what the newest made of them.
    """

    def decode(name: str, threads: int) -> tuple[Tensor, str]:
        now, known = parameters[name].detach().cpu().contiguous(), ""
        for encoded in (each.weights[name] for each in taken if name in each.weights):
            if known and known != encoded.entry.old:
                raise ValueError(f"{name} was changed between two updates")
            now = decode_tensor(name, encoded, now, threads=threads, verify_old=not known)
            known = encoded.entry.new
        return now, known

    names = dict.fromkeys(name for each in taken for name in each.weights)
    sizes = {name: parameters[name].nbytes for name in names}
    found = spread_by_size(decode, sizes, threads_for(sum(sizes.values())))
    return {n: w for n, (w, _) in found.items()}, {n: d for n, (_, d) in found.items()}
