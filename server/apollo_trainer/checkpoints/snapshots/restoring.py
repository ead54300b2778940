"""Puts a decoded state into the live weights: all of it, or nothing, or the mark of poison.

Old and new values are exchanged piece by piece, so that the way back needs no memory: after a
restore the decoded state holds what was live before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from apollo_grpc.errors import DataLoss, FailedPrecondition, Internal
from apollo_trainer.checkpoints.disk import in_batches, spread, threads_for
from apollo_trainer.checkpoints.snapshots.model_state import ModelState, moments_of
from apollo_trainer.checkpoints.snapshots.poison import Poison, PoisonedError
from apollo_trainer.checkpoints.snapshots.value_exchange import Exchange
from apollo_trainer.optim import Apollo


class UndoKeeper(Protocol):
    """Where a restore leaves its own way back."""

    def add(self, old: ModelState, new: ModelState) -> None:
        """Keeps what takes `new` back to `old`."""


@torch.no_grad()
def restore(
    state: ModelState,
    parameters: Mapping[str, Tensor],
    optimizer: Apollo,
    ring: UndoKeeper | None = None,
    poison: Poison | None = None,
) -> ModelState:
    """Makes `state` the live one; no step may be open, and nothing else may write.

    Calls the optimizer's `before_param_write` for each parameter. `state` is used up: what comes
    back, in its memory, is the state that was live before.

    Args:
        state: decoded and verified; its digests are what the live weights are verified by.
        parameters: the live ones, by the same names; moments of other ones stay as they are.
        ring: keeps an undo entry of the restore.
        poison: is set where neither state could be written, and cleared by a success.

    Raises FailedPrecondition where the state is of another model (nothing was touched), DataLoss
    where writing failed and the old state was put back, PoisonedError where that failed too.
    """
    poison = poison or Poison()
    _require_fitting(state, parameters, optimizer)
    wanted = {name: state.digest(name) for name in parameters}
    live, description = optimizer.named_state()
    moments = {
        name: tensor
        for of, parameter in parameters.items()
        for name, tensor in moments_of(optimizer, of, parameter).items()
    }
    old = ModelState(state.parameters, state.moments, copy.deepcopy(description))
    exchange = Exchange()
    try:
        for parameter in parameters.values():
            optimizer.before_param_write(parameter)
        _exchange(exchange, parameters, moments, state, wanted)
        # Its tensors hold the state already; what remains are counters, seed and settings.
        optimizer.load_named_state(live, state.description)
    except BaseException as error:
        _roll_back(exchange, live, old.description, optimizer, poison, error)
        if not isinstance(error, Exception):
            raise
        raise DataLoss(
            f"The state could not be put into the live weights ({error}); they are again what they "
            "were before. Try again, or restore another snapshot.",
            reason="RESTORE_FAILED",
        ) from error
    poison.why = ""
    if ring is not None:
        # The parameters themselves: the next write of each is announced by them.
        new = ModelState(dict(parameters), moments, state.description, digests=wanted)
        ring.add(old, new)
    return old


def _require_fitting(
    state: ModelState, parameters: Mapping[str, Tensor], optimizer: Apollo
) -> None:
    try:
        if state.parameters.keys() != parameters.keys():
            odd = min(state.parameters.keys() ^ parameters.keys())
            raise ValueError(f"parameter {odd!r} is not in both")
        for name, live in parameters.items():
            there = state.parameters[name]
            if there.shape != live.shape or there.dtype != live.dtype:
                raise ValueError(f"{name!r} is {there.dtype} {list(there.shape)} there")
        optimizer.check_named_state(state.moments, state.description)
    except ValueError as error:
        raise FailedPrecondition(
            f"The state is not one of the live model: {error}. Nothing was changed. Choose a "
            "snapshot of this model and of this optimizer.",
            reason="STATE_OF_ANOTHER_MODEL",
        ) from error


def _exchange(
    exchange: Exchange,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: ModelState,
    wanted: Mapping[str, str],
) -> None:
    def run(batch: list[tuple[str, Tensor, Tensor, str]]) -> None:
        for name, live, host, expected in batch:
            if exchange.run(live, host, read_back=bool(expected)) != expected:
                raise Internal(f"{name} reads back as something else than was written")

    items = [(n, live, state.parameters[n], wanted[n]) for n, live in parameters.items()]
    items += [(n, live, state.moments[n], "") for n, live in moments.items()]
    # The largest first: one that comes last is waited for by threads that have nothing to do.
    items.sort(key=lambda item: -item[1].nbytes)
    batches = in_batches(items, lambda item: item[1].nbytes)
    threads = threads_for(sum(live.nbytes for _, live, _, _ in items))
    spread(run, batches, threads)


def _roll_back(
    exchange: Exchange,
    live: Mapping[str, Tensor],
    description: Mapping[str, Any],
    optimizer: Apollo,
    poison: Poison,
    error: BaseException,
) -> None:
    try:
        exchange.take_back()
        optimizer.load_named_state(live, description)
    except BaseException as second:
        poison.why = f"a restore failed ({error}), and so did putting them back ({second})."
        raise PoisonedError(
            f"A restore failed ({error}), and so did putting the old weights back ({second}). The "
            "live weights are mixed: nothing is trained or synced from them until a restore "
            "succeeds. The model directory is as it was."
        ) from error
