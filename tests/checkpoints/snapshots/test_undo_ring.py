"""Undo: train, undo, train is the first training bit for bit, within a budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition, OutOfRange
from apollo_trainer.checkpoints.snapshots import undo_update
from apollo_trainer.checkpoints.snapshots.restoring import restore
from apollo_trainer.checkpoints.snapshots.undo_ring import UndoRing
from tests.checkpoints.learner import Learner, copied
from tests.waiting import HANG


class Undoable(Learner):
    """A learner whose updates go into a ring."""

    def __init__(self, budget: int = 2**30, **options: Any):
        super().__init__(**options)
        self.ring = UndoRing(budget)
        self.watch.add(self.ring.before_write)

    def update(self, number: int, count: int = 1) -> list[float]:
        losses = []
        for each in range(number, number + count):
            self.ring.begin(self.parameters, self.optimizer)
            try:
                losses += self.train(each, 1)
            finally:
                self.ring.end(self.parameters)
        return losses

    def undo(self, count: int) -> None:
        self.ring.undo(count, self.parameters, self.optimizer)


@pytest.fixture
def learner() -> Iterator[Undoable]:
    made = Undoable()
    yield made
    made.ring.stop()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "split16"])
@pytest.mark.parametrize("count", [1, 3])
def test_training_again_after_an_undo_is_the_first_training(rounding: Any, count: int) -> None:
    learner = Undoable(rounding=rounding)
    learner.update(0, 2)
    before = learner.state()
    losses = learner.update(2, count)
    after = learner.state()
    learner.undo(count)
    learner.assert_is(before)
    assert learner.update(2, count) == losses
    learner.assert_is(after)


def test_all_updates_can_be_taken_back_to_the_beginning(learner: Undoable) -> None:
    before = learner.state()
    learner.update(0, 6)
    learner.undo(2)
    learner.undo(1)
    learner.undo(3)
    learner.assert_is(before)
    assert len(learner.ring) == 0


def test_a_step_that_raised_halfway_can_be_taken_back(learner: Undoable) -> None:
    learner.update(0, 2)
    before = learner.state()
    learner.ring.begin(learner.parameters, learner.optimizer)
    learner.fail_halfway(2)
    learner.ring.end(learner.parameters)
    learner.undo(1)
    learner.assert_is(before)
    learner.undo(2)


@pytest.mark.parametrize("count", [-1, 0, 3])
def test_more_than_is_kept_is_refused(learner: Undoable, count: int) -> None:
    learner.update(0, 2)
    before = learner.state()
    with pytest.raises(OutOfRange, match="2 updates") as caught:
        learner.undo(count)
    assert caught.value.reason == "UNDO_OUT_OF_RANGE"
    learner.assert_is(before)


def test_weights_that_something_else_changed_are_not_touched(learner: Undoable) -> None:
    learner.update(0, 2)
    assert len(learner.ring) == 2
    with torch.no_grad():
        learner.parameters["model.norm.weight"].view(torch.int16)[3] ^= 1
    before = learner.state()
    with pytest.raises(FailedPrecondition, match="not those after the last") as caught:
        learner.undo(1)
    assert caught.value.reason == "UNDO_STALE"
    learner.assert_is(before)


def test_the_oldest_updates_give_way_to_the_budget(learner: Undoable) -> None:
    learner.update(0, 4)
    budget = int(learner.ring.size_bytes() * 0.8)
    small = Undoable(budget)
    small.update(0, 1)
    before = small.state()
    small.update(1, 7)
    assert 0 < len(small.ring) < 8
    assert small.ring.size_bytes() <= budget
    small.undo(len(small.ring))
    assert small.optimizer.step_count > before.description["step_count"]
    none = Undoable(budget=10)
    none.update(0, 1)
    assert len(none.ring) == 0


def test_a_forgotten_update_cannot_be_taken_back(learner: Undoable) -> None:
    learner.update(0, 2)
    learner.ring.clear()
    with pytest.raises(OutOfRange):
        learner.undo(1)


def test_a_parameter_without_a_gradient_takes_no_room(learner: Undoable) -> None:
    learner.update(0, 1)
    whole = learner.ring.size_bytes()
    learner.ring.clear()
    for name, parameter in learner.parameters.items():
        parameter.requires_grad_("norm" in name)
    learner.update(1, 1)
    assert learner.ring.size_bytes() < whole / 10


def delay_encoding(monkeypatch: pytest.MonkeyPatch, begin: threading.Event) -> None:
    encode = undo_update.encode_tensor

    def late(*arguments: Any, **options: Any) -> Any:
        assert begin.wait(HANG)
        return encode(*arguments, **options)

    monkeypatch.setattr(undo_update, "encode_tensor", late)


def test_an_update_goes_on_before_the_one_before_it_is_encoded(
    learner: Undoable, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner.update(0, 1)
    before = learner.state()
    assert len(learner.ring) == 1
    begin = threading.Event()
    delay_encoding(monkeypatch, begin)
    # The encoder has begun with one parameter, whose next write must wait for it.
    threading.Timer(0.3, begin.set).start()
    learner.update(1, 4)
    after = learner.state()
    learner.undo(4)
    learner.assert_is(before)
    learner.update(1, 4)
    learner.assert_is(after)


def test_training_right_after_a_restore_leaves_its_way_back_whole(
    learner: Undoable, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = learner.state()
    learner.update(0, 2)
    before = learner.state()
    assert len(learner.ring) == 2
    begin = threading.Event()
    delay_encoding(monkeypatch, begin)
    restore(copied(saved), learner.parameters, learner.optimizer, learner.ring.add)
    threading.Timer(0.2, begin.set).start()
    learner.update(5, 1)
    learner.undo(2)
    learner.assert_is(before)


def test_an_update_that_cannot_be_encoded_takes_those_before_it_along(
    learner: Undoable, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner.update(0, 2)
    assert len(learner.ring) == 2

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(undo_update, "encode_tensor", fail)
        learner.update(2, 1)
        assert len(learner.ring) == 0
    before = learner.state()
    learner.update(3, 2)
    with pytest.raises(OutOfRange, match="2 updates"):
        learner.undo(3)
    learner.undo(2)
    learner.assert_is(before)
