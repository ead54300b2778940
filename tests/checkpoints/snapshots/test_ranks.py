"""Snapshots of a model that two ranks divide are those of one process, and are put back by both."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from apollo_grpc.errors import ApolloError, DataLoss
from apollo_grpc.region import Region
from apollo_trainer.checkpoints.snapshots import (
    ModelState,
    Poison,
    UndoRing,
    of_all_ranks,
    restore,
)
from apollo_trainer.checkpoints.snapshots.restoring import PoisonedError, restore_part
from apollo_trainer.checkpoints.snapshots.value_exchange import Exchange
from apollo_trainer.optim import Apollo
from apollo_trainer.parallel.parts import gathered, part_of
from apollo_trainer.parallel.ranks import ALONE, RankRefused, Ranks
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from tests.optim.test_ranks import REGIONS, gradient, values
from tests.parallel.two_ranks import on_two_ranks


class Model:
    """Weights and optimizer of one rank, or of one process that has all."""

    def __init__(self, ranks: Ranks):
        whole = ranks.size == 1
        self.regions = {
            n: Region.whole_of(r[0].root) if whole else r[ranks.rank] for n, r in REGIONS.items()
        }
        self.ranks, self.taken = ranks, 0
        self.weights = {
            n: part_of(values(n, r.root, 99, torch.bfloat16), r) for n, r in self.regions.items()
        }
        self.optimizer = Apollo(
            list(self.weights.items()), lr=1e-2, rank=8, seed=5, regions=self.regions, ranks=ranks
        )

    def step(self) -> None:
        self.taken += 1
        given = {w: gradient(n, self.regions[n], self.taken, "") for n, w in self.weights.items()}
        self.optimizer.step(gradients=given)

    def snapshot(self) -> ModelState:
        return of_all_ranks(cast("CheckpointReader", self), self.optimizer, {})

    def roots(self) -> list[str]:
        return list(self.weights)

    def whole(self, name: str) -> torch.Tensor:
        return gathered(self.weights[name], self.regions[name], self.ranks)

    def restore(self, state: ModelState, poison: Poison | None = None) -> None:
        """As the first rank does, and as others do."""
        if self.ranks.rank == 0:
            restore(state, self.weights, self.optimizer, poison=poison)
        else:
            restore_part(state.description, self.weights, self.optimizer)

    def seen(self) -> dict[str, Any]:
        """All that a restore writes."""
        description = self.optimizer.description()
        counters = {k: description[k] for k in ("seed", "step_count", "skipped_nonfinite")}
        return {**self.weights, **self.optimizer.named_tensors(), **counters}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(
        torch.equal(a, other[n]) if isinstance(a, torch.Tensor) else a == other[n]
        for n, a in one.items()
    )


def copied(seen: dict[str, Any]) -> dict[str, Any]:
    return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in seen.items()}


def there_and_back(ranks: Ranks, of_one: ModelState) -> Any:
    torch.set_num_threads(1)
    model = Model(ranks)
    model.step()
    before, taken = copied(model.seen()), model.snapshot()
    whole = copied({**taken.parameters, **taken.moments, **taken.description})
    model.step()
    assert not same(model.seen(), before)
    model.restore(taken)
    assert same(model.seen(), before)
    model.restore(of_one)
    own = of_one.description
    assert model.optimizer.step_count == own["step_count"]
    return whole, copied(model.seen())


def test_of_two_ranks_it_is_put_back_by_one_and_the_reverse() -> None:
    alone = Model(ALONE)
    for _ in range(3):
        alone.step()
    of_one = alone.snapshot()
    expected = copied(alone.seen())
    found = on_two_ranks(there_and_back, of_one)
    regions_of_state = alone.optimizer.state_regions()
    for rank, (whole, parts) in enumerate(found):
        assert whole.keys() >= alone.weights.keys()
        for name, part in parts.items():
            if name in REGIONS:
                assert torch.equal(part, part_of(expected[name], REGIONS[name][rank]))
            elif name not in regions_of_state:
                assert part == expected[name]
    of_two, given = found[0][0], copied(found[0][0])
    moments = {n: given[n] for n in regions_of_state}
    described = {name: given[name] for name in of_one.description}
    restore(
        ModelState({n: given[n] for n in alone.weights}, moments, described),
        alone.weights,
        alone.optimizer,
    )
    assert same(alone.seen(), {name: of_two[name] for name in alone.seen()})


def refused(ranks: Ranks, taking_back_fails: bool) -> Any:
    torch.set_num_threads(1)
    model, poison = Model(ranks), Poison()
    model.step()
    taken = model.snapshot()
    model.step()
    before = copied(model.seen())
    if ranks.rank == 1:
        own, left = model.optimizer.before_param_write, [len(model.weights) // 2]

        def fails(*args: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise OSError("no room")
            own(*args)

        model.optimizer.before_param_write = fails
        if taking_back_fails:
            Exchange.take_back = fails_to_take_back  # type: ignore[method-assign]
    kind = None
    try:
        model.restore(taken, poison)
    except DataLoss as error:
        kind = "poisoned" if isinstance(error, PoisonedError) else "as before"
    return kind, same(model.seen(), before), poison.why


def fails_to_take_back(self: Exchange) -> None:
    raise OSError("nor here")


@pytest.mark.parametrize("taking_back_fails", [False, True])
def test_what_one_rank_cannot_write_all_take_back_or_the_weights_are_mixed(
    taking_back_fails: bool,
) -> None:
    first, second = on_two_ranks(refused, taking_back_fails)
    assert first[0] == second[0] == ("poisoned" if taking_back_fails else "as before")
    assert first[1]
    assert second[1] or taking_back_fails
    assert ("another trainer rank failed" in first[2]) == taking_back_fails


def undone(ranks: Ranks, changed_on: int | None) -> Any:
    """Three updates, of which two are taken back, and what became of a third."""
    torch.set_num_threads(1)
    model, ring, told = Model(ranks), UndoRing(2**20), list[str]()
    model.optimizer.before_param_write = ring.before_write
    seen = []
    for _ in range(3):
        with ring.recording(model.weights, model.optimizer):
            model.step()
        seen.append(copied(model.seen()))
    # What the last update wrote is read in the background.
    ring.settle()
    if ranks.rank == changed_on:
        next(iter(model.weights.values())).mul_(2)
    for count in (4, 2, 2, 1):
        try:
            ring.undo(count, model.weights, model.optimizer)
            told.append("")
        except (ApolloError, RankRefused) as error:
            told.append(getattr(error, "reason", ""))
        seen.append(copied(model.seen()))
    ring.stop()
    return seen, told


def test_updates_are_taken_back_by_all_ranks_or_by_none() -> None:
    for seen, told in on_two_ranks(undone, None):
        one, two, three, *after = seen
        assert told == ["UNDO_OUT_OF_RANGE", "", "UNDO_OUT_OF_RANGE", ""]
        assert same(after[0], three) and same(after[1], one) and same(after[2], one)
        assert after[3]["step_count"] == 0
        assert not same(two, one)
    for rank, (seen, told) in enumerate(on_two_ranks(undone, 1)):
        assert told == ["UNDO_OUT_OF_RANGE", "UNDO_STALE", "UNDO_STALE", "UNDO_STALE"]
        assert all(same(each, seen[3]) for each in seen[4:])
        assert same(seen[3], seen[2]) == (rank == 0)
