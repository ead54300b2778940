"""The last updates, in host memory: each one can be undone, bit for bit.

For each update the ring holds the ulp differences from the new values of the parameters that it
wrote to the old ones, and old copies of the moments, which change all over. They are encoded in the
background, during the next forward and backward.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from torch import Tensor

from apollo_grpc.errors import DataLoss, FailedPrecondition, OutOfRange
from apollo_trainer.checkpoints.disk import background_threads
from apollo_trainer.checkpoints.host_memory import DeviceEvent, HostBuffers, StagingCopy
from apollo_trainer.checkpoints.snapshots.model_state import ModelState, moments_of, to_host
from apollo_trainer.checkpoints.snapshots.restoring import Poison, put_back
from apollo_trainer.checkpoints.snapshots.undo_update import Recorded, Update, state_before
from apollo_trainer.optim import Apollo

log = logging.getLogger(__name__)


class UndoRing:
    """The newest updates, within a budget. One thread uses it: that of the steps.

    Each rank keeps those of its own part.

    Old values are first copied into buffers that are kept for all updates (pinned for a CUDA
    device): as many bytes as the weights and moments that an update writes, twice that where
    updates are faster than their encoding. The budget does not count them; `clear` frees them.

    Args:
        budget_bytes: of differences and old moments.
        keeps: whether any update is recorded.
    """

    def __init__(self, budget_bytes: int, *, keeps: bool = True):
        self._budget, self.keeps = budget_bytes, keeps
        self._updates: deque[Update] = deque()
        self._open: Update | None = None
        self._recorded: dict[int, Recorded] = {}
        self._names: dict[int, str] = {}
        self._optimizer: Apollo | None = None
        # By parameter: in the newest update that wrote it, and in the one before that.
        self._newest: dict[int, Recorded] = {}
        self._older: dict[int, Recorded] = {}
        self._buffers = HostBuffers()
        self._keeping: Future[None] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """How many updates can be undone; waits until all are encoded."""
        self.settle()
        return len(self._updates)

    def size_bytes(self) -> int:
        """Bytes that count to the budget; waits until all updates are encoded."""
        self.settle()
        return sum(update.size_bytes() for update in self._updates)

    @contextmanager
    def recording(self, parameters: Mapping[str, Tensor], optimizer: Apollo) -> Iterator[None]:
        """Around one update: it can be undone afterwards, also where it failed halfway."""
        if not self.keeps:
            yield
            return
        self.begin(parameters, optimizer)
        try:
            yield
        finally:
            self.end(parameters)

    def begin(self, parameters: Mapping[str, Tensor], optimizer: Apollo) -> None:
        """Call it before an update, while no step is open; `before_write` and `end` follow."""
        self._open, self._recorded = Update(copy.deepcopy(optimizer.description())), {}
        self._names = {id(p): name for name, p in parameters.items()}
        self._optimizer = optimizer

    def before_write(self, parameter: Tensor) -> None:
        """Copies a parameter before its write; waits while two updates of it are not encoded."""
        key = id(parameter)
        if key in self._recorded:
            return
        name, newest = self._names.get(key), self._newest.pop(key, None)
        if self._open is None or self._optimizer is None or name is None:
            if newest is not None:
                newest.before_next_write()
            return
        if older := self._older.pop(key, None):
            wait([older.encoded])
        if newest is not None and newest.encoded.done():
            newest = None
        live, buffers = moments_of(self._optimizer, name, parameter), self._buffers
        moments = {part: StagingCopy.of(tensor, buffers) for part, tensor in live.items()}
        old = StagingCopy.of(parameter, buffers)
        self._recorded[key] = Recorded(
            name, parameter, old, moments, buffers=buffers, previous=newest
        )
        if newest is not None:
            self._older[key] = newest

    def end(self, parameters: Mapping[str, Tensor]) -> None:
        """Call it after the update, also after one that failed halfway: it can be undone then."""
        update, recorded, optimizer = self._open, self._recorded, self._optimizer
        self._open, self._recorded = None, {}
        if update is None or not recorded:
            # A step that was refused wrote nothing.
            return
        # A step that was refused while its old values were copied is encoded, but not kept.
        self._submit(update, recorded, parameters, keep=optimizer is not None and optimizer.wrote)

    def add(self, old: ModelState, new: ModelState) -> None:
        """Keeps a change that was not the optimizer's, such as a restore, so that it can be undone.

        Args:
            old: is read in the background, until `before_write` tells of the next write.
            new: the live parameters, on any device, and their digests.
        """
        self.settle()
        update = Update(copy.deepcopy(old.description))
        update.moments = {name: to_host(tensor) for name, tensor in old.moments.items()}
        recorded = {}
        for name, values in old.parameters.items():
            live, digest = new.parameters[name], new.digests.get(name, "")
            recorded[id(live)] = Recorded(name, live, StagingCopy(values), {}, digest=digest)
        self._submit(update, recorded, new.parameters)

    def _submit(
        self,
        update: Update,
        recorded: dict[int, Recorded],
        parameters: Mapping[str, Tensor],
        *,
        keep: bool = True,
    ) -> None:
        self._newest |= recorded
        if self._pool is None:
            size = sum(p.nbytes for p in parameters.values())
            self._pool = ThreadPoolExecutor(background_threads(size), "undo")
        written = DeviceEvent(any(p.is_cuda for p in parameters.values()))
        # In the order of the writes: the next update comes to them in it.
        for each in recorded.values():
            self._pool.submit(each.encode, update, written)
        encoded = [each.encoded for each in recorded.values()]
        self._keeping = self._pool.submit(self._keep_encoded, update, encoded, self._keeping, keep)

    def undo(
        self,
        count: int,
        parameters: Mapping[str, Tensor],
        optimizer: Apollo,
        poison: Poison | None = None,
        writing: AbstractContextManager[None] | None = None,
    ) -> None:
        """Undoes the last updates, weights and Apollo state. Every rank does.

        Args:
            writing: is entered while the live weights are written, after all is decoded.

        Raises OutOfRange where fewer are kept, FailedPrecondition where the live weights are not
        those after the last update (nothing was touched), and what `restore` raises.
        """
        alike = (OutOfRange, FailedPrecondition, DataLoss)
        with optimizer.ranks.telling("undo", lambda: {"count": count}, alike):
            taken = self._newest_updates(count, optimizer)
            state = state_before(taken, parameters, optimizer)
            touched = {name: parameters[name] for name in state.parameters}
            with ExitStack() as entered:

                def enter() -> None:
                    entered.enter_context(writing or nullcontext())

                optimizer.ranks.agree(enter)
                put_back(state, touched, optimizer, poison)
            for _ in taken:
                self._updates.pop()

    def _newest_updates(self, count: int, optimizer: Apollo) -> list[Update]:
        """The newest first. Raises OutOfRange where some rank has fewer."""
        self.settle()
        kept = optimizer.ranks.least(len(self._updates))
        if not 0 < count <= kept:
            raise OutOfRange(
                f"{kept} updates can be taken back, not {count}; nothing was "
                "changed. Restore a snapshot" + (", or ask for fewer." if kept else "."),
                reason="UNDO_OUT_OF_RANGE",
            )
        return [self._updates[-1 - n] for n in range(count)]

    def clear(self) -> None:
        """Forgets all updates and frees the buffers."""
        self.settle()
        self._updates.clear()
        self._newest.clear()
        self._older.clear()
        self._buffers.clear()

    def stop(self) -> None:
        """Ends the threads, once all updates are encoded."""
        if self._pool is not None:
            self._pool.shutdown()

    def settle(self) -> None:
        """Waits until all updates are encoded."""
        if self._keeping is not None:
            wait([self._keeping])

    def _keep_encoded(
        self,
        update: Update,
        encoded: Sequence[Future[None]],
        before: Future[None] | None,
        keep: bool,
    ) -> None:
        wait([*encoded, *([before] if before else [])])
        if errors := [error for each in encoded if (error := each.exception())]:
            # Those before it can only be undone after it.
            self._updates.clear()
            log.warning("An update cannot be undone, nor those before it: %r", errors[0])
        elif keep:
            self._updates.append(update)
            total = sum(each.size_bytes() for each in self._updates)
            while self._updates and total > self._budget:
                total -= self._updates.popleft().size_bytes()
