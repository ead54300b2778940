"""Restore: train, snapshot, train, restore, train is one uninterrupted run, or nothing happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_grpc.errors import DataLoss, FailedPrecondition
from apollo_trainer.checkpoints.disk import threads as spreading
from apollo_trainer.checkpoints.snapshots import restoring, value_exchange
from apollo_trainer.checkpoints.snapshots.restoring import Poison, PoisonedError, restore
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots.undo_ring import UndoRing
from tests.checkpoints.learner import Learner, assert_same, copied


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "split16"])
def test_training_after_a_restore_is_the_uninterrupted_run(tmp_path: Path, rounding: Any) -> None:
    straight, learner, store = Learner(rounding), Learner(rounding), SnapshotStore(tmp_path)
    wanted = straight.train(0, 3) + straight.train(3, 4)
    losses = learner.train(0, 3)
    snapshot = store.create(learner.state(), "before")
    learner.train(20, 5)
    restore(store.load(snapshot.id), learner.parameters, learner.optimizer)
    losses += learner.train(3, 4)
    assert losses == wanted
    learner.assert_is(straight.state())


def test_a_fresh_process_goes_on_from_a_snapshot(tmp_path: Path) -> None:
    learner = Learner()
    learner.train(0, 3)
    snapshot = SnapshotStore(tmp_path).create(learner.state(), "before")
    learner.train(3, 2)
    other = Learner(seed=99)
    restore(SnapshotStore(tmp_path).load(snapshot.id), other.parameters, other.optimizer)
    other.train(3, 2)
    other.assert_is(learner.state())


def test_what_was_live_before_comes_back() -> None:
    learner = Learner()
    learner.train(0, 2)
    first = learner.state()
    learner.train(2, 2)
    second = learner.state()
    before = restore(copied(first), learner.parameters, learner.optimizer)
    learner.assert_is(first)
    assert_same(before, second)
    restore(before, learner.parameters, learner.optimizer)
    learner.assert_is(second)


def test_a_restore_can_be_undone() -> None:
    learner, ring = Learner(), UndoRing(2**30)
    learner.watch.add(ring.before_write)
    saved = learner.state()
    learner.train(0, 3)
    before = learner.state()
    restore(copied(saved), learner.parameters, learner.optimizer, ring.add)
    learner.assert_is(saved)
    ring.undo(1, learner.parameters, learner.optimizer)
    learner.assert_is(before)


def damage(what: str) -> tuple[Any, Any]:
    return {
        "a missing parameter": lambda s: s.parameters.popitem(),
        "another shape": lambda s: s.parameters.update({"model.norm.weight": torch.ones(3)}),
        "another dtype": lambda s: s.parameters.update(
            {"model.norm.weight": s.parameters["model.norm.weight"].float()}
        ),
        "a missing moment": lambda s: s.moments.popitem(),
        "another optimizer": lambda s: s.description.update(variant="mini"),
    }[what]


@pytest.mark.parametrize(
    "what",
    ["a missing parameter", "another shape", "another dtype", "a missing moment",
     "another optimizer"],
)  # fmt: skip
def test_a_state_of_another_model_is_refused_with_nothing_touched(what: str) -> None:
    learner = Learner()
    learner.train(0, 1)
    state, before = learner.state(), learner.state()
    damage(what)(state)  # type: ignore[operator]
    with pytest.raises(FailedPrecondition, match="Nothing was changed") as caught:
        restore(state, learner.parameters, learner.optimizer)
    assert caught.value.reason == "STATE_OF_ANOTHER_MODEL"
    learner.assert_is(before)


class FailingWrites:
    """Lets so many writes succeed; the next raises, as do all if it is broken for good."""

    def __init__(self, good: int, *, for_good: bool, after: bool = False):
        self.good, self.for_good, self.after, self.failed = good, for_good, after, False

    def __call__(self, live: Any, values: Any) -> None:
        self.good -= 1
        broken = self.good < 0 and (self.for_good or not self.failed)
        if not broken or self.after:
            live[...] = values
        if broken:
            self.failed = True
            if not self.after:
                half = len(live.reshape(-1)) // 2
                live.reshape(-1)[:half] = values.reshape(-1)[:half]
            raise RuntimeError("the device is gone")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("good", [0, 1, 7, 20, 400])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_restore_that_fails_halfway_puts_the_old_state_back(
    monkeypatch: pytest.MonkeyPatch, threads: int, good: int, after: bool
) -> None:
    learner, poison = Learner(), Poison()
    monkeypatch.setattr(restoring, "threads_for", lambda size: threads)
    monkeypatch.setattr(spreading, "_BATCH", 1000)
    saved = learner.state()
    learner.train(0, 2)
    before = learner.state()
    monkeypatch.setattr(value_exchange, "PIECE", 100)
    writes = FailingWrites(good, for_good=False, after=after)
    monkeypatch.setattr(value_exchange, "_write", writes)
    with pytest.raises(DataLoss, match="again what they were") as caught:
        restore(saved, learner.parameters, learner.optimizer, poison=poison)
    assert caught.value.reason == "RESTORE_FAILED"
    learner.assert_is(before)
    poison.require_sound()


def test_a_value_that_does_not_read_back_puts_the_old_state_back() -> None:
    learner = Learner()
    saved = learner.state()
    learner.train(0, 2)
    before = learner.state()
    saved.digests["model.norm.weight"] = saved.digest("model.embed_tokens.weight")
    with pytest.raises(DataLoss, match="reads back"):
        restore(saved, learner.parameters, learner.optimizer)
    learner.assert_is(before)


def test_weights_that_cannot_be_put_back_are_poisoned_until_a_restore_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner, poison = Learner(), Poison()
    saved = learner.state()
    learner.train(0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(value_exchange, "_write", FailingWrites(7, for_good=True))
        with pytest.raises(PoisonedError, match="mixed"):
            restore(copied(saved), learner.parameters, learner.optimizer, poison=poison)
    with pytest.raises(FailedPrecondition, match="Restore a snapshot") as caught:
        poison.require_sound()
    assert caught.value.reason == "WEIGHTS_POISONED"
    restore(copied(saved), learner.parameters, learner.optimizer, poison=poison)
    poison.require_sound()
    learner.assert_is(saved)


def test_parameters_that_lie_transposed_are_restored_by_value() -> None:
    learner = Learner()
    saved = learner.state()
    weight = learner.parameters["model.layers.0.mlp.up_proj.weight"]
    weight.data = weight.data.T.contiguous().T
    learner.train(0, 2)
    restore(copied(saved), learner.parameters, learner.optimizer)
    learner.assert_is(saved)
