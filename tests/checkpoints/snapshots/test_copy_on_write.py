"""A snapshot while training goes on is the model as it was when it began."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_grpc.errors import Aborted
from apollo_trainer.checkpoints.host_memory import HostBuffers
from apollo_trainer.checkpoints.snapshots.copy_on_write import SnapshotCopy
from apollo_trainer.checkpoints.snapshots.restoring import restore
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from tests.checkpoints.learner import Learner, assert_same
from tests.waiting import HANG


@pytest.fixture
def learner() -> Learner:
    made = Learner()
    made.train(0, 2)
    return made


@pytest.mark.parametrize("rounding", ["stochastic", "split16"])
def test_what_a_step_comes_to_first_it_copies_first(rounding: Any) -> None:
    learner = Learner(rounding)
    learner.train(0, 2)
    wanted = learner.state()
    copying = SnapshotCopy(learner.parameters, learner.optimizer)
    learner.watch.add(copying.before_write)
    learner.train(2, 2)
    # It was not started: whatever is right was copied by the step.
    assert copying.copied_by_writers == len(learner.parameters)
    assert_same(copying.state(), wanted)


def test_a_copy_amid_a_step_is_one_of_before_it(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, stepping = learner.state(), threading.Event()
    original, copied = HostBuffers.take, []

    def slowly(buffers: HostBuffers, like: torch.Tensor) -> torch.Tensor:
        copied.append(threading.current_thread().name)
        if copied[-1] == "snapshot-copy" and len(copied) > 10:
            assert stepping.wait(HANG)
            time.sleep(0.05)
        return original(buffers, like)

    monkeypatch.setattr(HostBuffers, "take", slowly)
    # From the other end than the step: in its order, the step would only wait for each copy.
    backwards = dict(reversed(learner.parameters.items()))
    copying = SnapshotCopy(backwards, learner.optimizer).start()
    learner.watch.add(lambda _: stepping.set())
    learner.watch.add(copying.before_write)
    learner.train(2, 1)
    assert_same(copying.state(), wanted)
    assert set(copied) == {"snapshot-copy", "MainThread"}
    assert learner.optimizer.step_count == 3


def test_many_snapshots_of_running_training_are_each_of_one_step(
    tmp_path: Path, learner: Learner
) -> None:
    store, wanted, futures = SnapshotStore(tmp_path), [], []
    writer = ThreadPoolExecutor(1)
    for number in range(2, 8):
        copying = SnapshotCopy(learner.parameters, learner.optimizer, {"batch": number}).start()
        wanted.append(learner.state())
        learner.watch.add(copying.before_write)
        futures.append(writer.submit(copying.write_to, store, f"before {number}"))
        learner.train(number, 1)
    writer.shutdown()
    for number, (future, state) in enumerate(zip(futures, wanted, strict=True), 2):
        info = future.result()
        assert info.name == f"before {number}"
        loaded = store.load(info.id)
        assert loaded.extra == {"batch": number}
        assert_same(loaded, state)


def test_what_one_snapshot_took_is_the_memory_of_the_next_and_of_a_load(
    tmp_path: Path, learner: Learner
) -> None:
    store, buffers = SnapshotStore(tmp_path), HostBuffers()
    places = []
    for number in range(3):
        copying = SnapshotCopy(learner.parameters, learner.optimizer, {}, buffers).start()
        wanted, state = learner.state(), copying.state()
        places.append({t.data_ptr() for t in (*state.parameters.values(), *state.moments.values())})
        info = copying.write_to(store, f"number {number}")
        assert_same(store.load(info.id), wanted)
        learner.train(2 + number, 1)
    assert places[0] == places[1] == places[2]
    loaded = store.load(info.id, buffers.take)
    assert_same(loaded, wanted)
    assert {t.data_ptr() for t in loaded.parameters.values()} <= places[0]


def test_a_step_that_raises_halfway_leaves_the_snapshot_whole(learner: Learner) -> None:
    wanted = learner.state()
    copying = SnapshotCopy(learner.parameters, learner.optimizer)
    learner.watch.add(copying.before_write)
    learner.fail_halfway(2)
    assert 0 < copying.copied_by_writers < len(learner.parameters)
    restore(copying.state(), learner.parameters, learner.optimizer)
    learner.assert_is(wanted)


def test_a_restore_amid_a_snapshot_leaves_the_snapshot_whole(learner: Learner) -> None:
    older = learner.state()
    learner.train(2, 1)
    wanted = learner.state()
    copying = SnapshotCopy(learner.parameters, learner.optimizer)
    learner.watch.add(copying.before_write)
    restore(older, learner.parameters, learner.optimizer)
    assert_same(copying.state(), wanted)


def test_a_write_that_was_not_announced_ends_the_snapshot_not_the_training(
    tmp_path: Path, learner: Learner
) -> None:
    copying = SnapshotCopy(learner.parameters, learner.optimizer)
    with torch.no_grad():
        learner.parameters["model.norm.weight"].add_(1)
    store = SnapshotStore(tmp_path)
    with pytest.raises(Aborted) as caught:
        store.create(copying, "one")
    assert caught.value.reason == "SNAPSHOT_OVERTAKEN"
    assert store.list() == []
