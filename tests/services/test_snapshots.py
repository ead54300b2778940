"""Snapshots, undo, restore and export over a real channel, beside an engine that serves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_grpc.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Resource,
)
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.snapshots.copy_on_write import SnapshotCopy
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots.value_exchange import Exchange
from apollo_trainer.engine import model_checkpoints
from apollo_trainer.runs.saving import RunSaves
from tests.waiting import HANG

FAST = pb.OptimizerConfig(lr=1e-2)


def steps(events: list[pb.RunEvent]) -> list[pb.RunEvent.Step]:
    return [event.step for event in events if event.HasField("step")]


def losses(events: list[pb.RunEvent]) -> list[float]:
    return [step.loss for step in steps(events)]


@pytest.fixture
def served(start_engine: Any, start_server: Any) -> Any:
    """An engine, and a caller of a server that is attached to it."""
    engine, caller = start_engine(), start_server()
    caller.wait_attached()
    return engine, caller


def create(caller: Any, name: str = "", **fields: Any) -> cp.Snapshot:
    request = cp.CreateSnapshotRequest(name=name, **fields)
    *_, last = caller.checkpoints.CreateSnapshot(request, timeout=HANG)
    return last.snapshot


def restore(caller: Any, snapshot: str, **fields: Any) -> cp.RestoreResult:
    request = cp.RestoreSnapshotRequest(snapshot_id=snapshot, **fields)
    *_, last = caller.checkpoints.RestoreSnapshot(request, timeout=HANG)
    return last.result


def undo(caller: Any, updates: int = 1, **fields: Any) -> cp.RestoreResult:
    *_, last = caller.checkpoints.Undo(cp.UndoRequest(updates=updates, **fields), timeout=HANG)
    return last.result


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_training_after_a_restore_is_the_training_that_followed_the_snapshot(served: Any) -> None:
    engine, caller = served
    caller.train(epochs=3, optimizer=FAST)
    snapshot, weights = create(caller, "good"), engine.model.values()
    assert (snapshot.optimizer_step, snapshot.weight_version) == (3, 3)
    first = losses(caller.train(epochs=4, optimizer=FAST))
    learned = engine.model.values()
    result = restore(caller, "good")
    assert same(engine.model.values(), weights)
    assert (result.optimizer_step, result.weight_version) == (3, 8)
    assert caller.status().optimizer_step == 3
    assert caller.status().weight_version == engine.engine.weight_version == 8
    assert engine.calls[-3:] == ["pause keep", "reset caches", "resume"]
    assert losses(caller.train(epochs=4, optimizer=FAST)) == first
    assert same(engine.model.values(), learned)


def test_a_restart_of_the_server_keeps_snapshots_and_the_bits_of_what_follows(
    served: Any, start_server: Any
) -> None:
    _engine, caller = served
    caller.train(epochs=2, optimizer=FAST)
    snapshot = create(caller)
    first = losses(caller.train(epochs=3, optimizer=FAST))
    caller.stop()
    again = start_server()
    again.wait_attached()
    (kept,) = again.checkpoints.ListSnapshots(cp.ListSnapshotsRequest(), timeout=HANG).snapshots
    assert kept == snapshot
    restore(again, snapshot.snapshot_id)
    assert losses(again.train(epochs=3, optimizer=FAST)) == first


def test_an_undo_takes_back_weights_and_state_bit_for_bit(served: Any) -> None:
    engine, caller = served
    caller.train(epochs=2, optimizer=FAST)
    before = engine.model.values()
    first = losses(caller.train(epochs=3, optimizer=FAST))
    result = undo(caller, 3)
    assert same(engine.model.values(), before)
    assert (result.optimizer_step, result.weight_version) == (2, 6)
    assert losses(caller.train(epochs=3, optimizer=FAST)) == first


def test_more_than_is_kept_cannot_be_taken_back(served: Any, error_of: Any) -> None:
    engine, caller = served
    caller.train(optimizer=FAST)
    weights = engine.model.values()
    error = error_of(caller.checkpoints.Undo(cp.UndoRequest(updates=2), timeout=HANG))
    assert isinstance(error, OutOfRange)
    assert error.reason == "UNDO_OUT_OF_RANGE"
    assert same(engine.model.values(), weights)
    assert not engine.engine.leases.active


def test_a_version_that_moved_on_is_told_and_nothing_changes(served: Any, error_of: Any) -> None:
    engine, caller = served
    snapshot = create(caller, "start")
    caller.train(optimizer=FAST)
    weights = engine.model.values()
    asked = cp.RestoreSnapshotRequest(snapshot_id="start", expected_weight_version=0)
    error = error_of(caller.checkpoints.RestoreSnapshot(asked, timeout=HANG))
    assert isinstance(error, Aborted)
    assert error.metadata == {"weight_version": "1"}
    assert same(engine.model.values(), weights)
    assert restore(caller, snapshot.snapshot_id, expected_weight_version=1).weight_version == 2


def test_a_snapshot_of_another_state_brings_its_optimizer_back(served: Any) -> None:
    _engine, caller = served
    caller.train(epochs=2, optimizer=FAST)
    create(caller, "rank 8")
    first = losses(caller.train(epochs=2, optimizer=FAST))
    reset = pb.OptimizerConfig(lr=1e-2, rank=4, reset_optimizer=True)
    caller.train(epochs=2, optimizer=reset)
    restore(caller, "rank 8")
    assert losses(caller.train(epochs=2, optimizer=FAST)) == first


def test_snapshots_are_listed_in_pages_found_by_name_and_deleted(
    served: Any, error_of: Any
) -> None:
    _, caller = served
    made = [create(caller, name) for name in ("a", "b", "c")]
    page = caller.checkpoints.ListSnapshots(cp.ListSnapshotsRequest(page_size=2), timeout=HANG)
    assert [s.name for s in page.snapshots] == ["c", "b"]
    request = cp.ListSnapshotsRequest(page_size=2, page_token=page.next_page_token)
    rest = caller.checkpoints.ListSnapshots(request, timeout=HANG)
    assert ([s.name for s in rest.snapshots], rest.next_page_token) == (["a"], "")
    get = cp.GetSnapshotRequest(snapshot_id="b")
    assert caller.checkpoints.GetSnapshot(get, timeout=HANG).snapshot == made[1]
    delete = cp.DeleteSnapshotRequest(snapshot_id="b")
    caller.checkpoints.DeleteSnapshot(delete, timeout=HANG)
    missing = error_of(lambda: caller.checkpoints.GetSnapshot(get, timeout=HANG))
    assert isinstance(missing, NotFound)
    assert missing.resource == Resource("snapshot", get.snapshot_id)
    taken = caller.checkpoints.CreateSnapshot(cp.CreateSnapshotRequest(name="a"), timeout=HANG)
    there = error_of(taken)
    assert isinstance(there, AlreadyExists)
    assert there.resource == Resource("snapshot", "a")


def test_a_request_id_makes_one_snapshot(served: Any) -> None:
    _, caller = served
    assert create(caller, "once", request_id="x") == create(caller, "once", request_id="x")


def test_a_snapshot_that_was_damaged_changes_nothing(
    served: Any, error_of: Any, model_folder: Path
) -> None:
    engine, caller = served
    snapshot = create(caller, "damaged")
    caller.train(optimizer=FAST)
    weights = engine.model.values()
    found = model_folder.parent / f".{model_folder.name}.apollo" / "snapshots"
    (state,) = (found / snapshot.snapshot_id).glob("apollo*")
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    asked = cp.RestoreSnapshotRequest(snapshot_id="damaged")
    error = error_of(caller.checkpoints.RestoreSnapshot(asked, timeout=HANG))
    assert isinstance(error, DataLoss)
    assert same(engine.model.values(), weights)
    assert caller.train()[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_mixed_weights_are_neither_trained_nor_synced_until_a_restore(
    served: Any,
    error_of: Any,
    monkeypatch: pytest.MonkeyPatch,
    start_server: Any,
    state_dir: Path,
) -> None:
    _engine, caller = served
    create(caller, "good")
    caller.train(epochs=2, optimizer=FAST)

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    def fail_halfway(exchange: Exchange, live: torch.Tensor, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            live[0] = 1.0
        fail()

    with monkeypatch.context() as patch:
        patch.setattr(Exchange, "run", fail_halfway)
        patch.setattr(Exchange, "take_back", fail)
        asked = cp.RestoreSnapshotRequest(snapshot_id="good")
        assert error_of(caller.checkpoints.RestoreSnapshot(asked, timeout=HANG)).reason == (
            "WEIGHTS_POISONED"
        )
    (state,) = state_dir.glob("models/*/apollo_state.safetensors")
    saved = state.read_bytes()
    for _ in range(2):
        error = error_of(caller.checkpoints.Undo(cp.UndoRequest(), timeout=HANG))
        assert error.reason == "WEIGHTS_POISONED", "it writes no more than the last update did"
        failure = caller.train()[-1].finished.failure
        assert failure.reason == "WEIGHTS_POISONED"
        error = error_of(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "WEIGHTS_POISONED"
        # A restart of the server makes them no better.
        caller.stop()
        assert state.read_bytes() == saved, "moments that may be mixed are not saved"
        caller = start_server()
        caller.wait_attached()
    restore(caller, "good")
    assert caller.train()[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    *_, last = caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG)
    assert last.result.method == cp.SYNC_METHOD_EXCHANGE


def test_a_sync_after_a_restore_puts_the_restored_weights_on_disk(
    served: Any, model_folder: Path
) -> None:
    engine, caller = served
    create(caller, "start")
    caller.train(epochs=2, optimizer=FAST)
    list(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    restore(caller, "start")
    *_, last = caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG)
    assert last.result.method == cp.SYNC_METHOD_EXCHANGE
    on_disk = AutoModelForCausalLM.from_pretrained(model_folder)
    live = engine.model.values()
    assert all(torch.equal(live[n], p) for n, p in on_disk.named_parameters())


def test_an_export_is_a_model_directory_of_the_live_weights(
    served: Any, tmp_path: Path, error_of: Any
) -> None:
    engine, caller = served
    caller.train(epochs=2, optimizer=FAST)
    target = tmp_path / "exported"
    request = cp.ExportRequest(directory=str(target))
    *progress, last = caller.checkpoints.Export(request, timeout=HANG)
    assert (last.result.directory, last.result.weight_version) == (str(target), 2)
    assert progress[-1].progress.bytes_done == last.result.bytes_written > 0
    loaded, live = AutoModelForCausalLM.from_pretrained(target), engine.model.values()
    assert all(torch.equal(live[n], p) for n, p in loaded.named_parameters())
    assert json.loads((target / "config.json").read_text())["model_type"] == "qwen3"
    assert isinstance(error_of(caller.checkpoints.Export(request, timeout=HANG)), AlreadyExists)
    relative = cp.ExportRequest(directory="somewhere")
    error = error_of(caller.checkpoints.Export(relative, timeout=HANG))
    assert isinstance(error, InvalidArgument)


def test_automatic_snapshots_are_taken_before_runs_and_in_them(
    start_engine: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = RunSaves._snapshot_while_running

    def in_time(saves: RunSaves, step: int) -> None:
        # Steps of a millisecond would overtake the disk.
        saves._wait_for_snapshots()
        take(saves, step)

    monkeypatch.setattr(RunSaves, "_snapshot_while_running", in_time)
    start_engine()
    caller = start_server(snapshot_before_runs=True, snapshot_steps=2, automatic_snapshots=3)
    caller.wait_attached()
    caller.train(epochs=5, optimizer=FAST)
    caller.train(epochs=1, optimizer=FAST)
    create(caller, "the last one to be written")
    found = caller.checkpoints.ListSnapshots(cp.ListSnapshotsRequest(), timeout=HANG).snapshots
    assert [s.optimizer_step for s in found] == [6, 5, 4, 2]


class SlowDisk:
    """Holds every snapshot that is to be written until `open` is set, and counts the copies."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.open, self.begun, self.copies, self.most = threading.Event(), threading.Event(), 0, 0
        create, disk = SnapshotStore.create, self

        class Counted(SnapshotCopy):
            def __init__(self, *arguments: Any):
                disk.copies += 1
                disk.most = max(disk.most, disk.copies)
                super().__init__(*arguments)

            def give_back(self) -> None:
                super().give_back()
                disk.copies -= 1

        def slowly(store: SnapshotStore, *arguments: Any) -> Any:
            disk.begun.set()
            assert disk.open.wait(HANG)
            return create(store, *arguments)

        patch.setattr(model_checkpoints, "SnapshotCopy", Counted)
        patch.setattr(SnapshotStore, "create", slowly)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.open.set()


def test_an_automatic_snapshot_is_skipped_while_one_is_written_and_the_run_says_so(
    start_engine: Any, start_server: Any, slow_disk: SlowDisk
) -> None:
    start_engine()
    caller = start_server(snapshot_steps=1)
    caller.wait_attached()
    events = caller.train(epochs=6, optimizer=FAST)
    warnings = [e.warning.reason for e in events if e.HasField("warning")]
    assert warnings == ["SNAPSHOT_SKIPPED"]
    assert (slow_disk.copies, len(steps(events))) == (1, 6)
    slow_disk.open.set()
    create(caller, "after it")
    found = caller.checkpoints.ListSnapshots(cp.ListSnapshotsRequest(), timeout=HANG).snapshots
    assert [s.optimizer_step for s in found] == [6, 1]
    assert slow_disk.most == 1


def test_snapshots_that_are_asked_for_wait_their_turn_without_a_copy(
    served: Any, slow_disk: SlowDisk, error_of: Any
) -> None:
    _, caller = served
    calls = [
        caller.checkpoints.CreateSnapshot(
            cp.CreateSnapshotRequest(name=f"number {number}", request_id=str(number)), timeout=HANG
        )
        for number in range(6)
    ]
    assert slow_disk.begun.wait(HANG)
    # The training thread is free meanwhile, and what waits can be stopped.
    assert caller.train(optimizer=FAST)[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    stop = caller.checkpoints.CancelOperation(
        cp.CancelOperationRequest(request_id="5"), timeout=HANG
    )
    assert stop.state == cp.CANCEL_STATE_CANCELLED
    assert error_of(calls.pop()).reason == "JOB_CANCELLED"
    assert slow_disk.copies == 1
    slow_disk.open.set()
    made = [list(call)[-1].snapshot for call in calls]
    assert {s.name for s in made} == {f"number {number}" for number in range(5)}
    assert slow_disk.most == 1
