"""The last updates, in host memory: each one can be taken back, bit for bit.

For each update the ring holds the ulp difference of every parameter that it wrote, from the new
values to the old ones, and old copies of the moments, which change all over. Encoding is done in
the background, during the next forward and backward.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from apollo_grpc.errors import FailedPrecondition, OutOfRange
from apollo_trainer.checkpoints.delta_file import EncodedTensor, decode_tensor, encode_tensor
from apollo_trainer.checkpoints.model_state import ModelState, moments_of, to_host
from apollo_trainer.checkpoints.poison import Poison
from apollo_trainer.checkpoints.restore import restore
from apollo_trainer.optim import Apollo


@dataclass
class _Update:
    """What takes one update back."""

    description: dict[str, Any]
    moments: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, EncodedTensor] = field(default_factory=dict)

    def size_bytes(self) -> int:
        frames = sum(e.frames.nbytes for e in self.weights.values())
        return frames + sum(t.nbytes for t in self.moments.values())


class UndoRing:
    """Updates, the newest of which are kept within a budget.

    Between `begin` and `end` the weights' old values are held as they are: as many bytes again as
    the weights that the update writes, which do not count to the budget.

    Args:
        budget_bytes: of differences and old moments.
    """

    def __init__(self, budget_bytes: int):
        self._budget = budget_bytes
        self._updates: deque[_Update] = deque()
        self._open: _Update | None = None
        self._old: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._optimizer: Apollo | None = None
        self._encoding: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "undo")

    def __len__(self) -> int:
        """Updates that can be taken back."""
        self._wait()
        return len(self._updates)

    def size_bytes(self) -> int:
        """Bytes of what is kept."""
        self._wait()
        return sum(update.size_bytes() for update in self._updates)

    def begin(self, parameters: Mapping[str, Tensor], optimizer: Apollo) -> None:
        """Before an update, no step being open; `before_write` and `end` follow."""
        _, description = optimizer.named_state()
        self._open, self._old = _Update(copy.deepcopy(description)), {}
        self._names = {id(p): name for name, p in parameters.items()}
        self._optimizer = optimizer

    def before_write(self, parameter: Tensor) -> None:
        """Copies what is about to be written; waits until its last change was encoded."""
        if encoding := self._encoding.pop(id(parameter), None):
            encoding.result()
        name = self._names.get(id(parameter))
        if self._open is None or self._optimizer is None or name is None or name in self._old:
            return
        self._old[name] = to_host(parameter)
        for key, tensor in moments_of(self._optimizer, name, parameter).items():
            self._open.moments[key] = to_host(tensor)

    def end(self, parameters: Mapping[str, Tensor]) -> None:
        """After the update, or after it failed halfway: what was written can be taken back."""
        update, old = self._open, self._old
        self._open, self._old = None, {}
        if update is None or not old:
            # A step that was refused has nothing to take back.
            return
        self._encoding = {
            id(parameters[name]): self._pool.submit(_encode, update, name, parameters[name], values)
            for name, values in old.items()
        }
        self._pool.submit(self._keep, update)

    def add(self, old: ModelState, new: ModelState) -> None:
        """Keeps the way back from a change that was none of the optimizer's, such as a restore."""
        update = _Update(copy.deepcopy(old.description))
        update.moments = {name: to_host(tensor) for name, tensor in old.moments.items()}
        for name, values in old.parameters.items():
            _encode(update, name, new.parameters[name], values)
        self._wait()
        self._keep(update)

    def undo(
        self,
        count: int,
        parameters: Mapping[str, Tensor],
        optimizer: Apollo,
        poison: Poison | None = None,
    ) -> None:
        """Takes the last updates back, weights and Apollo state.

        Raises OutOfRange where fewer are kept, FailedPrecondition where the live weights are not
        those after the last update (nothing was touched), and what `restore` raises.
        """
        self._wait()
        if not 0 < count <= len(self._updates):
            raise OutOfRange(
                f"{len(self._updates)} updates can be taken back, not {count}; nothing was "
                "changed. Ask for fewer, or restore a snapshot.",
                reason="UNDO_OUT_OF_RANGE",
            )
        taken = [self._updates[-1 - n] for n in range(count)]
        state = _state_before(taken, parameters, optimizer)
        touched = {name: parameters[name] for name in state.parameters}
        restore(state, touched, optimizer, poison=poison)
        for _ in taken:
            self._updates.pop()

    def clear(self) -> None:
        """Forgets all updates."""
        self._wait()
        self._updates.clear()

    def stop(self) -> None:
        """Ends the thread."""
        self._pool.shutdown()

    def _wait(self) -> None:
        self._pool.submit(int).result()
        for encoding in self._encoding.values():
            encoding.result()

    def _keep(self, update: _Update) -> None:
        with self._lock:
            self._updates.append(update)
            total = sum(each.size_bytes() for each in self._updates)
            while self._updates and total > self._budget:
                total -= self._updates.popleft().size_bytes()


def _encode(update: _Update, name: str, new: Tensor, old: Tensor) -> None:
    live = new.detach().cpu().contiguous()
    update.weights[name] = encode_tensor(live, old)


def _state_before(
    taken: list[_Update], parameters: Mapping[str, Tensor], optimizer: Apollo
) -> ModelState:
    """The state before these updates, the newest first. Raises FailedPrecondition."""
    weights: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    moments = {name: to_host(t) for name, t in optimizer.named_state()[0].items()}
    for update in taken:
        for name, encoded in update.weights.items():
            now = weights[name] if name in weights else parameters[name].detach().cpu().contiguous()
            try:
                weights[name] = decode_tensor(name, encoded, now)
            except ValueError as error:
                raise FailedPrecondition(
                    f"The live weights are not those after the last update ({error}); nothing was "
                    "changed. Restore a snapshot instead.",
                    reason="UNDO_STALE",
                ) from error
            digests[name] = encoded.entry.new
        moments.update(update.moments)
    description = copy.deepcopy(taken[-1].description)
    return ModelState(
        weights, {n: to_host(t) for n, t in moments.items()}, description, {}, digests
    )
