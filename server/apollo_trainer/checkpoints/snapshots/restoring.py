"""Restore: a decoded state becomes the live one, all of it or nothing, or the weights are poisoned.

Old and new values are exchanged piece by piece, so that a rollback needs no memory: after a
restore, the decoded state holds what was live before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from apollo_grpc.errors import DataLoss, FailedPrecondition, Internal
from apollo_grpc.region import Region
from apollo_trainer.checkpoints.disk import in_batches, spread, threads_for
from apollo_trainer.checkpoints.snapshots.model_state import ModelState, moments_of
from apollo_trainer.checkpoints.snapshots.value_exchange import Exchange
from apollo_trainer.optim import Apollo
from apollo_trainer.parallel.parts import handed_out


class PoisonedError(DataLoss):
    """A restore failed halfway, and its rollback failed too."""

    default_reason = "WEIGHTS_POISONED"


class Poison:
    """Whether the live weights are a mix of two states; the next restore that succeeds ends that.

    Attributes:
        why: a sentence; empty while the weights are sound.
    """

    def __init__(self) -> None:
        self.why = ""

    @property
    def refusal(self) -> str:
        """What a user reads; empty while the weights are sound."""
        if not self.why:
            return ""
        return (
            f"The live weights are mixed: {self.why} Nothing is trained or synced from them; "
            "the model directory is as it was. Restore a snapshot, or start vLLM anew."
        )

    def require_sound(self) -> None:
        """Raises FailedPrecondition while the live weights are mixed."""
        if self.why:
            raise FailedPrecondition(self.refusal, reason="WEIGHTS_POISONED")


@torch.no_grad()
def restore(
    state: ModelState,
    parameters: Mapping[str, Tensor],
    optimizer: Apollo,
    keep: Callable[[ModelState, ModelState], object] | None = None,
    poison: Poison | None = None,
) -> ModelState:
    """Makes `state` the live one; no step may be open, and nothing else may write.

    Calls the optimizer's `before_param_write` for each parameter. `state` is used up: the result,
    in its memory, is the state that was live before.

    Args:
        state: decoded and verified; its digests verify the live weights. Where ranks divide the
            model: on the first rank, which has the others call `restore_part`.
        parameters: the live ones, by the same names; moments of others stay as they are.
        keep: is called with the old and the new state after a success, to undo the restore.
        poison: is set where the rollback failed, and cleared by a success.

    Raises FailedPrecondition where the state is of another model (nothing was touched), DataLoss
    where writing failed and the old state was put back, PoisonedError where that failed too.
    """
    poison, ranks = poison or Poison(), optimizer.ranks
    _require_fitting(state, parameters, optimizer)
    if ranks.size == 1:
        return _put(state, parameters, optimizer, keep, poison)
    with ranks.telling("put", lambda: {"description": state.description}, (DataLoss,)):
        part = _part(state, state.description, parameters, optimizer)
        return _put(part, parameters, optimizer, keep, poison)


@torch.no_grad()
def restore_part(
    description: dict[str, Any],
    parameters: Mapping[str, Tensor],
    optimizer: Apollo,
    keep: Callable[[ModelState, ModelState], object] | None = None,
) -> None:
    """A further rank's share of `restore`. Raises DataLoss where a rank could not write its own."""
    part = _part(None, description, parameters, optimizer)
    _put(part, parameters, optimizer, keep, Poison())


@torch.no_grad()
def put_back(
    state: ModelState,
    parameters: Mapping[str, Tensor],
    optimizer: Apollo,
    poison: Poison | None = None,
) -> None:
    """Makes a state the live one that was this rank's own part before. Every rank calls it.

    Raises as `restore`, once it has begun to write.
    """
    _put(state, parameters, optimizer, None, poison or Poison())


def _part(
    whole: ModelState | None,
    description: dict[str, Any],
    parameters: Mapping[str, Tensor],
    optimizer: Apollo,
) -> ModelState:
    """What of a state is this rank's, handed out by the first, which alone has it."""
    ranks, regions = optimizer.ranks, optimizer.regions
    part = ModelState({}, {}, description)
    for name, live in parameters.items():
        region = regions.get(name) or Region.whole_of(live.shape)
        given = None if whole is None else whole.parameters.pop(name)
        part.parameters[name] = handed_out(given, live, region, ranks)
    regions_of_state = optimizer.state_regions()
    for name, live in optimizer.named_tensors().items():
        given = None if whole is None else whole.moments.pop(name)
        part.moments[name] = handed_out(given, live, regions_of_state[name], ranks)
    return part


def _put(
    state: ModelState,
    parameters: Mapping[str, Tensor],
    optimizer: Apollo,
    keep: Callable[[ModelState, ModelState], object] | None,
    poison: Poison,
) -> ModelState:
    wanted = {name: state.digest(name) for name in parameters}
    moments = {
        name: tensor
        for of, parameter in parameters.items()
        for name, tensor in moments_of(optimizer, of, parameter).items()
    }
    description = copy.deepcopy(optimizer.description())
    old = ModelState(state.parameters, state.moments, description)
    exchange = Exchange()

    def write() -> None:
        for parameter in parameters.values():
            optimizer.before_param_write(parameter)
        _exchange_all(exchange, parameters, moments, state, wanted)
        optimizer.adopt(state.description)

    try:
        optimizer.ranks.agree(write)
    except BaseException as error:
        _roll_back(exchange, old.description, optimizer, poison, error)
        if not isinstance(error, Exception):
            raise
        raise DataLoss(
            f"The state could not be put into the live weights ({error}); they are again what they "
            "were before. Try again, or restore another snapshot.",
            reason="RESTORE_FAILED",
        ) from error
    poison.why = ""
    if keep is not None:
        # The parameters themselves: the next write of each is announced by them.
        keep(old, ModelState(dict(parameters), moments, state.description, digests=wanted))
    return old


def _require_fitting(
    state: ModelState, parameters: Mapping[str, Tensor], optimizer: Apollo
) -> None:
    try:
        if state.parameters.keys() != parameters.keys():
            odd = min(state.parameters.keys() ^ parameters.keys())
            raise ValueError(f"parameter {odd!r} is not in both")
        for name, live in parameters.items():
            there, region = state.parameters[name], optimizer.regions.get(name)
            shape = live.shape if region is None else torch.Size(region.root)
            if there.shape != shape or there.dtype != live.dtype:
                raise ValueError(f"{name!r} is {there.dtype} {list(there.shape)} there")
        optimizer.check_named_state(state.moments, state.description)
    except ValueError as error:
        raise FailedPrecondition(
            f"The state is not one of the live model: {error}. Nothing was changed. Choose a "
            "snapshot of this model and of this optimizer.",
            reason="STATE_OF_ANOTHER_MODEL",
        ) from error


def _exchange_all(
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
    # The largest first: if one came last, the other threads would have nothing to do.
    items.sort(key=lambda item: -item[1].nbytes)
    batches = in_batches(items, lambda item: item[1].nbytes)
    spread(run, batches, threads_for(sum(live.nbytes for _, live, _, _ in items)))


def _roll_back(
    exchange: Exchange,
    description: Mapping[str, Any],
    optimizer: Apollo,
    poison: Poison,
    error: BaseException,
) -> None:
    def take_back() -> None:
        exchange.take_back()
        optimizer.adopt(description)

    try:
        optimizer.ranks.agree(take_back)
    except BaseException as second:
        poison.why = f"a restore failed ({error}), and so did putting them back ({second})."
        raise PoisonedError(
            f"A restore failed ({error}), and so did putting the old weights back ({second}). The "
            "live weights are mixed: nothing is trained or synced from them until a restore "
            "succeeds. The model directory is as it was."
        ) from error
