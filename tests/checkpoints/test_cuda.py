"""Snapshots, undo and restore of weights on a CUDA device: copies that the device makes beside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from apollo_trainer.checkpoints.disk.digests import digest
from apollo_trainer.checkpoints.host_memory import HostBuffers
from apollo_trainer.checkpoints.snapshots.copy_on_write import SnapshotCopy
from apollo_trainer.checkpoints.snapshots.restoring import restore
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots.undo_ring import UndoRing
from tests.checkpoints.learner import Learner, assert_same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def learner() -> Learner:
    made = Learner(device="cuda")
    made.train(0, 2)
    return made


@pytest.mark.parametrize("size", [0, 1, 2**22, 2**22 + 3, 3 * 2**22 + 1])
def test_a_devices_bytes_have_the_digest_of_the_hosts(size: int) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(size).bfloat16()
    assert digest(tensor.cuda()) == digest(tensor)
    matrix = torch.randn(30, 50)
    assert digest(matrix.cuda().T) == digest(matrix.T)


def test_snapshots_beside_steps_are_each_of_one_step(tmp_path: Path, learner: Learner) -> None:
    store, buffers, wanted, futures = SnapshotStore(tmp_path), HostBuffers(), [], []
    writer = ThreadPoolExecutor(1)
    for number in range(2, 10):
        wanted.append(learner.state())
        copying = SnapshotCopy(learner.parameters, learner.optimizer, {}, buffers)
        learner.watch.add(copying.before_write)
        futures.append(writer.submit(copying.start().write_to, store, f"before {number}"))
        learner.train(number, 1)
    writer.shutdown()
    for future, state in zip(futures, wanted, strict=True):
        assert_same(store.load(future.result().id), state)


def test_what_a_step_comes_to_first_the_device_copies_before_it_writes(learner: Learner) -> None:
    wanted = learner.state()
    copying = SnapshotCopy(learner.parameters, learner.optimizer)
    learner.watch.add(copying.before_write)
    learner.train(2, 3)
    assert_same(copying.state(), wanted)


def test_training_again_after_a_restore_is_the_first_training(
    tmp_path: Path, learner: Learner
) -> None:
    store = SnapshotStore(tmp_path)
    info = store.create(learner.state(), "one")
    losses = learner.train(2, 4)
    after = learner.state()
    buffers = HostBuffers(pinned=True)
    restore(store.load(info.id, buffers.take), learner.parameters, learner.optimizer)
    assert learner.train(2, 4) == losses
    learner.assert_is(after)


def test_updates_are_taken_back(learner: Learner) -> None:
    before, ring = learner.state(), UndoRing(2**30)
    learner.watch.add(ring.before_write)
    for number in range(2, 6):
        ring.begin(learner.parameters, learner.optimizer)
        learner.train(number, 1)
        ring.end(learner.parameters)
    ring.undo(4, learner.parameters, learner.optimizer)
    ring.stop()
    learner.assert_is(before)
