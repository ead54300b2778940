"""One update in the undo ring: its old values are staged, then encoded, then decoded by an undo.

Old values are copied into buffers that are used again for every update: fresh memory would cost
several times the copy, at each step. The encoded form is made in the background.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.disk import background_threads, spread_by_size, threads_for
from apollo_trainer.checkpoints.host_memory import DeviceEvent, HostBuffers, StagingCopy
from apollo_trainer.checkpoints.snapshots.delta_file import (
    EncodedTensor,
    decode_tensor,
    encode_tensor,
)
from apollo_trainer.checkpoints.snapshots.model_state import ModelState, to_host
from apollo_trainer.optim import Apollo
from apollo_trainer.parallel.ranks import RankRefused


@dataclass
class Update:
    """What undoes one update: differences to the old weights, old moments, the description."""

    description: dict[str, Any]
    moments: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, EncodedTensor] = field(default_factory=dict)

    def size_bytes(self) -> int:
        """Bytes of differences and old moments."""
        frames = sum(e.frames.nbytes for e in self.weights.values())
        return frames + sum(t.nbytes for t in self.moments.values())


class Recorded:
    """The old values of one parameter and its moments, until they are encoded.

    Args:
        old: of the parameter.
        moments: the old ones, by their names.
        buffers: the pool of `old` and `moments`; None where they are in none.
        previous: the same parameter in the update before, where that may not be encoded yet.
        digest: of the values after the update, where it is known.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        old: StagingCopy,
        moments: Mapping[str, StagingCopy],
        *,
        buffers: HostBuffers | None = None,
        previous: Recorded | None = None,
        digest: str = "",
    ):
        self.name, self._parameter, self._digest = name, parameter, digest
        self._old, self._moments, self._buffers = old, moments, buffers
        self._previous = previous
        self._after: StagingCopy | None = None
        self._begun, self._lock = False, threading.Lock()
        self.encoded: Future[None] = Future()
        if previous is not None:
            previous.before_next_write(old)

    def before_next_write(self, after: StagingCopy | None = None) -> None:
        """Call it before the parameter is written again. Waits only while it is being encoded.

        Args:
            after: a copy of the parameter as it is now; without one this waits until it is encoded.
        """
        with self._lock:
            if after is not None and not self._begun:
                self._after = after
                return
        # The ring sees to errors: no step fails because an update cannot be undone.
        wait([self.encoded])

    def encode(self, update: Update, written: DeviceEvent) -> None:
        """Adds the parameter to the update and gives the buffers back; sets `encoded`.

        Args:
            written: the end of the update on the device; before it, values may be half new.
        """
        try:
            if self._previous is not None:
                # Its values after the update are the old ones of this.
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
        return StagingCopy.of(self._parameter, self._buffers or HostBuffers()).tensor()


def state_before(
    taken: Sequence[Update], parameters: Mapping[str, Tensor], optimizer: Apollo
) -> ModelState:
    """The state before these updates, the newest first; of parameters, those that they wrote.

    Of each rank its own part; every rank calls it. Raises FailedPrecondition where the parameters,
    those of any rank, are not what the newest made of them.
    """
    weights, digests = dict[str, Tensor](), dict[str, str]()

    def decode() -> None:
        found = _weights_before(taken, parameters)
        weights.update(found[0])
        digests.update(found[1])

    try:
        optimizer.ranks.agree(decode)
    except (ValueError, RankRefused) as error:
        raise FailedPrecondition(
            f"The live weights are not those after the last update ({error}); nothing was "
            "changed. Restore a snapshot instead.",
            reason="UNDO_STALE",
        ) from error
    moments = optimizer.named_tensors()
    for update in taken:
        moments.update(update.moments)
    description = copy.deepcopy(taken[-1].description)
    on_host = {name: to_host(tensor) for name, tensor in moments.items()}
    return ModelState(weights, on_host, description, digests=digests)


def _weights_before(
    taken: Sequence[Update], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights and their digests."""

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
