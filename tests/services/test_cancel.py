"""A job on checkpoints that is stopped: all is as it was, and the same call begins it anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_grpc.errors import ApolloError, Cancelled, NotFound
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.disk.file_ops import FileOps
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots.value_exchange import Exchange
from tests.checkpoints.faulty_disk import tree
from tests.waiting import HANG

FAST = pb.OptimizerConfig(lr=1e-2)


class Gate:
    """Holds whoever comes by, until it is opened."""

    def __init__(self) -> None:
        self._reached, self._open = threading.Event(), threading.Event()

    def wait(self) -> None:
        self._reached.set()
        assert self._open.wait(HANG)

    def reached(self) -> None:
        assert self._reached.wait(HANG)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that is open once the test has ended, however it ends."""
    gate = Gate()
    yield gate
    gate.open()


def with_a_snapshot(start_engine: Any, start_server: Any) -> tuple[Any, Any]:
    """An engine, and a caller who took the snapshot "start" of it."""
    engine, caller = start_engine(), start_server()
    caller.wait_attached()
    list(caller.checkpoints.CreateSnapshot(cp.CreateSnapshotRequest(name="start"), timeout=HANG))
    return engine, caller


class Call:
    """A stream that is read in the background."""

    def __init__(self, stream: Any, error_of: Callable[[Any], ApolloError]):
        self._ended: list[Any] = []

        def read() -> None:
            self._ended.append(error_of(stream))

        self._thread = threading.Thread(target=read, daemon=True)
        self._thread.start()

    def error(self) -> ApolloError:
        """What it ended with."""
        self._thread.join(HANG)
        assert self._ended
        error: ApolloError = self._ended[0]
        return error


def cancel(caller: Any, request_id: str = "x") -> cp.CancelState:
    request = cp.CancelOperationRequest(request_id=request_id)
    state: cp.CancelState = caller.checkpoints.CancelOperation(request, timeout=HANG).state
    return state


def stream_of(caller: Any, job: str, folder: Path) -> Any:
    """A call of each kind, with the id "x"."""
    stub = caller.checkpoints
    calls = {
        "sync": lambda: stub.Sync(cp.SyncRequest(request_id="x"), timeout=HANG),
        "rollforward": lambda: stub.Sync(
            cp.SyncRequest(request_id="x", method=cp.SYNC_METHOD_ROLLFORWARD), timeout=HANG
        ),
        "snapshot": lambda: stub.CreateSnapshot(
            cp.CreateSnapshotRequest(request_id="x", name="mine"), timeout=HANG
        ),
        "adopt": lambda: stub.Adopt(
            cp.AdoptRequest(request_id="x", directory=str(folder / "new")), timeout=HANG
        ),
        "export": lambda: stub.Export(
            cp.ExportRequest(request_id="x", directory=str(folder / "new")), timeout=HANG
        ),
    }
    return calls[job]()


def files_of(folder: Path) -> dict[str, bytes]:
    """All that is on disk but locks."""
    locks = ("LOCK", "OWNER")
    return {name: data for name, data in tree(folder).items() if not name.endswith(locks)}


@pytest.mark.parametrize("job", ["sync", "rollforward", "snapshot", "adopt", "export"])
def test_a_job_at_work_stops_and_leaves_all_as_it_was(
    job: str,
    caller: Any,
    tmp_path: Path,
    error_of: Any,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caller.train(optimizer=FAST)
    before, fsync = files_of(tmp_path), FileOps.fsync

    def wait_and_flush(ops: FileOps, file: int) -> None:
        gate.wait()
        fsync(ops, file)

    with monkeypatch.context() as patch:
        patch.setattr(FileOps, "fsync", wait_and_flush)
        call = Call(stream_of(caller, job, tmp_path), error_of)
        gate.reached()
        assert cancel(caller) == cp.CANCEL_STATE_STOPPING
        gate.open()
        error = call.error()
    assert isinstance(error, Cancelled)
    assert error.reason == "JOB_CANCELLED"
    assert cancel(caller) == cp.CANCEL_STATE_CANCELLED
    assert files_of(tmp_path) == before
    # The same call begins it anew.
    *_, last = stream_of(caller, job, tmp_path)
    assert last.WhichOneof("update") in ("result", "snapshot")
    assert cancel(caller) == cp.CANCEL_STATE_TOO_LATE
    assert caller.train(optimizer=FAST)[-1].finished.state == pb.RUN_STATE_SUCCEEDED


@pytest.mark.parametrize("job", ["sync", "snapshot", "adopt", "export"])
def test_a_job_that_waits_for_a_run_ends_at_once_and_never_begins(
    job: str, caller: Any, tmp_path: Path, error_of: Any, wait: Any
) -> None:
    run = caller.start(epochs=100_000)
    run_id = next(run).event.run_id
    wait(lambda: caller.status().active_run_id == run_id, "the run")
    before = files_of(tmp_path)
    call = Call(stream_of(caller, job, tmp_path), error_of)

    def known() -> bool:
        try:
            return bool(cancel(caller) == cp.CANCEL_STATE_CANCELLED)
        except grpc.RpcError:
            return False

    wait(known, "the call")
    assert call.error().reason == "JOB_CANCELLED"
    assert caller.status().active_run_id == run_id
    assert cancel(caller) == cp.CANCEL_STATE_CANCELLED
    caller.cancel(run_id)
    list(run)
    assert caller.train(optimizer=FAST)[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert files_of(tmp_path) == before


def test_a_restore_that_writes_is_finished_and_not_torn(
    start_engine: Any, start_server: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, caller = with_a_snapshot(start_engine, start_server)
    weights = engine.model.values()
    caller.train(optimizer=FAST)
    run = Exchange.run

    def wait_and_write(exchange: Exchange, *arguments: Any, **options: Any) -> str:
        gate.wait()
        return run(exchange, *arguments, **options)

    monkeypatch.setattr(Exchange, "run", wait_and_write)
    asked = cp.RestoreSnapshotRequest(request_id="x", snapshot_id="start")
    stream = caller.checkpoints.RestoreSnapshot(asked, timeout=HANG)
    gate.reached()
    assert cancel(caller) == cancel(caller) == cp.CANCEL_STATE_TOO_LATE
    gate.open()
    *_, last = stream
    assert last.result.optimizer_step == 0
    assert all(torch.equal(engine.model.values()[name], w) for name, w in weights.items())


def test_a_restore_that_decodes_is_stopped(
    start_engine: Any,
    start_server: Any,
    gate: Gate,
    error_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, caller = with_a_snapshot(start_engine, start_server)
    caller.train(optimizer=FAST)
    weights = engine.model.values()
    load = SnapshotStore.load

    def wait_and_load(store: SnapshotStore, *arguments: Any) -> Any:
        gate.wait()
        return load(store, *arguments)

    monkeypatch.setattr(SnapshotStore, "load", wait_and_load)
    asked = cp.RestoreSnapshotRequest(request_id="x", snapshot_id="start")
    call = Call(caller.checkpoints.RestoreSnapshot(asked, timeout=HANG), error_of)
    gate.reached()
    assert cancel(caller) == cp.CANCEL_STATE_STOPPING
    gate.open()
    assert call.error().reason == "JOB_CANCELLED"
    assert all(torch.equal(engine.model.values()[name], w) for name, w in weights.items())
    assert not engine.engine.leases.active
    assert caller.train(optimizer=FAST)[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_an_id_that_no_call_had_is_not_found(caller: Any, error_of: Any) -> None:
    error = error_of(lambda: cancel(caller, "unknown"))
    assert isinstance(error, NotFound)
    assert error.reason == "OPERATION_NOT_FOUND"


def test_a_restore_amid_a_sync_waits_and_the_directory_holds_what_was_synced(
    start_engine: Any,
    start_server: Any,
    model_folder: Path,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, caller = with_a_snapshot(start_engine, start_server)
    start = engine.model.values()
    caller.train(optimizer=FAST)
    learned, fsync = engine.model.values(), FileOps.fsync

    def wait_and_flush(ops: FileOps, file: int) -> None:
        gate.wait()
        fsync(ops, file)

    monkeypatch.setattr(FileOps, "fsync", wait_and_flush)
    sync = caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG)
    gate.reached()
    asked = cp.RestoreSnapshotRequest(snapshot_id="start")
    restore = caller.checkpoints.RestoreSnapshot(asked, timeout=HANG)
    assert all(torch.equal(engine.model.values()[name], w) for name, w in learned.items())
    gate.open()
    *_, synced = sync
    *_, restored = restore
    assert (synced.result.weight_version, restored.result.weight_version) == (1, 2)
    on_disk = dict(AutoModelForCausalLM.from_pretrained(model_folder).named_parameters())
    assert all(torch.equal(learned[name], p) for name, p in on_disk.items())
    assert all(torch.equal(engine.model.values()[name], w) for name, w in start.items())
