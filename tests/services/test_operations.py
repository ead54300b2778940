"""Operations over a real channel: found, watched and cancelled by whomever, and kept on disk."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import (
    Aborted,
    AlreadyExists,
    ApolloError,
    Cancelled,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.disk.file_ops import FileOps
from apollo_trainer.ledger.operations import OperationChange
from tests.server_process import served
from tests.services.test_cancel import Call, Gate, gate
from tests.waiting import HANG, wait_until

__all__ = ["gate"]
FAST = pb.OptimizerConfig(lr=1e-2)


# --- over a kill ------------------------------------------------------------------------------


def hold_flushes() -> None:
    """In a server's process: who flushes a file to the disk waits while $HELD exists."""
    held, fsync = Path(os.environ["HELD"]), FileOps.fsync

    def wait_and_flush(ops: FileOps, file: int) -> None:
        while held.exists():
            time.sleep(0.01)
        fsync(ops, file)

    FileOps.fsync = wait_and_flush  # type: ignore[method-assign]


class Snapshot:
    """A snapshot that is asked for in the background."""

    def __init__(self, client: ApolloClient, name: str):
        self._error: ApolloError | None = None

        def ask() -> None:
            try:
                client.create_snapshot(name, request_id=f"for {name}")
            except ApolloError as error:
                self._error = error

        self._thread = threading.Thread(target=ask, daemon=True)
        self._thread.start()

    def error(self) -> ApolloError | None:
        self._thread.join(HANG)
        return self._error


def in_state(client: ApolloClient, state: str) -> cp.Operation:
    """The operation in a state, once there is one."""
    wait_until(lambda: client.operations(states=[state]).operations, f"an operation {state}")
    (found,) = client.operations(states=[state]).operations
    return found


def test_begun_by_one_listed_watched_and_cancelled_by_another_and_kept_over_a_kill(
    model_folder: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held"
    with (
        served(model_folder, hold_flushes, HELD=str(held)) as server,
        ApolloClient(server.address, retry_seconds=0) as one,
        ApolloClient(server.address) as other,
    ):
        held.touch()
        kept = Snapshot(one, "kept")
        running = in_state(other, "running")
        dropped = Snapshot(one, "dropped")
        waiting = in_state(other, "waiting")
        assert [o.operation_id for o in other.operations().operations] == [
            waiting.operation_id,
            running.operation_id,
        ]
        assert other.status().active_operation_id == running.operation_id
        watch = other.watch_operation(running.operation_id)
        assert next(watch).operation.state == cp.OPERATION_STATE_RUNNING
        assert other.cancel_operation(waiting.operation_id) == "CANCELLED"
        assert isinstance(dropped.error(), Cancelled)

        server.end(signal.SIGKILL)
        held.unlink()
        assert isinstance(kept.error(), Unavailable)
        with pytest.raises(Unavailable):
            list(watch)
        server.start()
        server.wait_attached()
        cut_off = other.operation(running.operation_id)
        assert cut_off.state == cp.OPERATION_STATE_FAILED
        assert cut_off.failure.reason == "OPERATION_INTERRUPTED"
        assert cut_off.create_time == running.create_time
        assert not cut_off.HasField("progress")
        assert other.operation(waiting.operation_id).state == cp.OPERATION_STATE_CANCELLED

        made = one.create_snapshot("kept", request_id="for kept")
        again = other.operation(request_id="for kept")
        assert (again.operation_id, again.snapshot) == (running.operation_id, made)
        with pytest.raises(AlreadyExists) as taken:
            other.sync(request_id="for kept")
        assert taken.value.metadata == {"operation_id": running.operation_id}
        assert other.create_snapshot("kept", request_id="for kept") == made
        assert list(other.list_snapshots().snapshots) == [made]
        assert other.cancel_operation(running.operation_id) == "TOO_LATE"
        assert other.cancel_operation(request_id="for dropped") == "CANCELLED"


# --- one operation ----------------------------------------------------------------------------


@contextmanager
def held_flushes(gate: Gate, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever flushes a file waits at the gate."""
    fsync = FileOps.fsync

    def wait_and_flush(ops: FileOps, file: int) -> None:
        gate.wait()
        fsync(ops, file)

    with patch.context() as within:
        within.setattr(FileOps, "fsync", wait_and_flush)
        yield


def sync(caller: Any, request_id: str = "", **fields: Any) -> Any:
    request = cp.SyncRequest(request_id=request_id, **fields)
    return caller.checkpoints.Sync(request, timeout=HANG)


def get(caller: Any, operation_id: str = "", request_id: str = "") -> cp.Operation:
    request = cp.GetOperationRequest(operation_id=operation_id, request_id=request_id)
    found: cp.Operation = caller.checkpoints.GetOperation(request, timeout=HANG).operation
    return found


def watch(caller: Any, operation_id: str) -> Any:
    request = cp.WatchOperationRequest(operation_id=operation_id)
    return caller.checkpoints.WatchOperation(request, timeout=HANG)


def listed(caller: Any, **fields: Any) -> cp.ListOperationsResponse:
    request = cp.ListOperationsRequest(**fields)
    found: cp.ListOperationsResponse = caller.checkpoints.ListOperations(request, timeout=HANG)
    return found


def test_the_same_id_twice_is_one_operation(
    caller: Any, call_at: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.train(optimizer=FAST)
    with held_flushes(gate, monkeypatch):
        calls = [sync(caller, "x"), sync(call_at(caller.address), "x")]
        ids = [next(call).operation_id for call in calls]
        gate.reached()
        watched = watch(caller, ids[0])
        states = (answer.operation.state for answer in watched)
        assert cp.OPERATION_STATE_RUNNING in states
        gate.open()
        ends = [list(call) for call in calls]
    assert {answer.operation_id for end in ends for answer in end} == set(ids)
    assert ends[0][-1].result == ends[1][-1].result
    assert ends[0][-1].result.method == cp.SYNC_METHOD_EXCHANGE
    last = list(watched)[-1].operation
    assert last == get(caller, request_id="x") == listed(caller).operations[0]
    assert (last.state, last.sync) == (cp.OPERATION_STATE_SUCCEEDED, ends[0][-1].result)
    assert last.create_time.ToNanoseconds() <= last.start_time.ToNanoseconds()
    assert last.start_time.ToNanoseconds() < last.end_time.ToNanoseconds()
    assert len(listed(caller).operations) == 1
    assert caller.status().active_operation_id == ""


def test_one_that_waits_for_a_run_is_watched_to_its_end(
    caller: Any, call_at: Any, wait: Any
) -> None:
    run = caller.start(epochs=100_000)
    run_id = next(run).event.run_id
    wait(lambda: caller.status().active_run_id == run_id, "the run")
    begun = next(sync(caller))
    watched = watch(call_at(caller.address), begun.operation_id)
    first = next(watched).operation
    assert (first.state, first.kind) == (cp.OPERATION_STATE_WAITING, cp.OPERATION_KIND_SYNC)
    caller.cancel(run_id)
    *_, last = watched
    assert last.operation.HasField("sync")


def test_one_that_failed_begins_anew_under_the_same_id(
    caller: Any, error_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(ops: FileOps, file: int) -> None:
        raise OSError(28, "No space left on device")

    caller.train(optimizer=FAST)
    with monkeypatch.context() as patch:
        patch.setattr(FileOps, "fsync", refuse)
        assert error_of(sync(caller, "x")).reason == "DIRECTORY_NOT_WRITABLE"
    failed = get(caller, request_id="x")
    assert failed.state == cp.OPERATION_STATE_FAILED
    assert failed.failure.reason == "DIRECTORY_NOT_WRITABLE"
    *_, last = sync(caller, "x")
    assert last.operation_id == failed.operation_id
    again = get(caller, failed.operation_id)
    assert (again.sync, again.create_time) == (last.result, failed.create_time)


def test_what_ended_is_told_without_an_engine(
    start_engine: Any, start_server: Any, error_of: Any
) -> None:
    engine, caller = start_engine(), start_server()
    caller.wait_attached()
    *_, synced = sync(caller, "x")
    caller.stop()
    engine.stop()
    again = start_server()
    assert list(sync(again, "x")) == [synced]
    assert isinstance(error_of(sync(again, "y")), Unavailable)
    assert error_of(lambda: get(again, request_id="y")).reason == "OPERATION_NOT_FOUND"


def test_a_deletion_is_an_operation(caller: Any, error_of: Any) -> None:
    list(caller.checkpoints.CreateSnapshot(cp.CreateSnapshotRequest(name="a"), timeout=HANG))
    request = cp.DeleteSnapshotRequest(snapshot_id="a", request_id="x")
    for _ in range(2):
        caller.checkpoints.DeleteSnapshot(request, timeout=HANG)
    found = get(caller, request_id="x")
    assert found.kind == cp.OPERATION_KIND_DELETE_SNAPSHOT
    assert (found.state, found.WhichOneof("outcome")) == (cp.OPERATION_STATE_SUCCEEDED, None)
    gone = cp.DeleteSnapshotRequest(snapshot_id="a")
    error = error_of(lambda: caller.checkpoints.DeleteSnapshot(gone, timeout=HANG))
    assert isinstance(error, NotFound)
    assert listed(caller).operations[0].failure.reason == error.reason


@pytest.mark.parametrize("kind", ["sync", "export", "snapshot"])
def test_of_another_weight_version_nothing_is_written(
    kind: str, caller: Any, error_of: Any, tmp_path: Path
) -> None:
    caller.train(optimizer=FAST)
    stub, target = caller.checkpoints, str(tmp_path / "new")
    calls: dict[str, Callable[..., Any]] = {
        "sync": lambda **f: stub.Sync(cp.SyncRequest(**f)),
        "export": lambda **f: stub.Export(cp.ExportRequest(directory=target, **f)),
        "snapshot": lambda **f: stub.CreateSnapshot(cp.CreateSnapshotRequest(**f)),
    }
    error = error_of(calls[kind](expected_weight_version=0))
    assert isinstance(error, Aborted)
    assert (error.reason, error.metadata) == ("WEIGHT_VERSION_CHANGED", {"weight_version": "1"})
    assert not Path(target).exists()
    assert not stub.ListSnapshots(cp.ListSnapshotsRequest(), timeout=HANG).snapshots
    assert not caller.status().HasField("last_sync")
    *_, last = calls[kind](expected_weight_version=1)
    assert (last.snapshot if kind == "snapshot" else last.result).weight_version == 1


# --- looking ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["GetOperation", "WatchOperation", "CancelOperation"])
def test_an_operation_is_named_by_one_id_that_is_known(
    call: str, caller: Any, error_of: Any
) -> None:
    def ask(**ids: str) -> ApolloError:
        request = getattr(cp, f"{call}Request")(**ids)
        answer = getattr(caller.checkpoints, call)
        if call == "WatchOperation":
            return error_of(answer(request, timeout=HANG))
        return error_of(lambda: answer(request, timeout=HANG))

    for wrong in ({}, {"operation_id": "a", "request_id": "b"}):
        assert isinstance(ask(**wrong), InvalidArgument)
    for unknown in ({"operation_id": "a"}, {"request_id": "a" * 1000}):
        assert ask(**unknown).reason == "OPERATION_NOT_FOUND"


def test_operations_are_listed_in_pages_by_state_and_newest_first(
    caller: Any, error_of: Any
) -> None:
    made = [list(sync(caller))[-1].operation_id for _ in range(3)]
    error_of(sync(caller, "failed", expected_weight_version=9))
    failed = get(caller, request_id="failed").operation_id
    newest, token, found = [failed, *reversed(made)], "", []
    for size in (2, 1, 1):
        page = listed(caller, page_size=size, page_token=token)
        found += [operation.operation_id for operation in page.operations]
        token = page.next_page_token
    assert (found, token) == (newest, "")
    for states, among in (([4], [failed]), ([3], newest[1:]), ([1, 2, 5], []), ([3, 4], newest)):
        assert [o.operation_id for o in listed(caller, states=states).operations] == among
    wrong: list[dict[str, Any]] = [
        {"page_size": -1},
        {"states": [99]},
        {"states": [0]},
        *({"page_token": token} for token in ("x", "-1", "9" * 19, "²")),
    ]
    for fields in wrong:
        error = error_of(lambda fields=fields: listed(caller, **fields))
        (violation,) = error.violations
        assert violation.field.partition("[")[0] in fields


def test_watchers_have_a_limit_of_their_own(
    start_engine: Any,
    start_server: Any,
    gate: Gate,
    error_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_engine()
    caller = start_server(max_streams=1)
    caller.wait_attached()
    caller.train(optimizer=FAST)
    with held_flushes(gate, monkeypatch):
        call = sync(caller)
        operation_id = next(call).operation_id
        watched = watch(caller, operation_id)
        next(watched)
        assert isinstance(error_of(watch(caller, operation_id)), ResourceExhausted)
        assert isinstance(error_of(sync(caller)), ResourceExhausted)
        assert get(caller, operation_id).state
        gate.open()
        assert list(call)[-1].HasField("result")
        assert list(watched)[-1].operation.HasField("sync")


# --- a ledger that refuses --------------------------------------------------------------------


def refusing(when: Callable[[OperationChange], bool], patch: pytest.MonkeyPatch) -> None:
    """The ledger takes no change of an operation that is so."""
    write = OperationChange.write

    def refuse(change: OperationChange, connection: sqlite3.Connection) -> None:
        if when(change):
            raise sqlite3.OperationalError("database or disk is full")
        write(change, connection)

    patch.setattr(OperationChange, "write", refuse)


def test_what_the_ledger_refuses_is_done_all_the_same_and_has_no_id(
    caller: Any, error_of: Any, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    caller.train(optimizer=FAST)
    with monkeypatch.context() as patch:
        refusing(lambda change: True, patch)
        with held_flushes(gate, monkeypatch):
            call, other = sync(caller, "x"), Call(sync(caller, "y"), error_of)
            gate.reached()
            follower = sync(caller, "x")
            assert next(follower).operation_id == ""
            request = cp.CancelOperationRequest(request_id="y")

            def cancelled() -> bool:
                try:
                    answer = caller.checkpoints.CancelOperation(request, timeout=HANG)
                except Exception:
                    return False
                return bool(answer.state == cp.CANCEL_STATE_CANCELLED)

            wait_until(cancelled, "the second sync")
            assert isinstance(other.error(), Cancelled)
            gate.open()
            ends = [list(each)[-1] for each in (call, follower)]
    assert ends[0] == ends[1]
    assert (ends[0].operation_id, ends[0].result.method) == ("", cp.SYNC_METHOD_EXCHANGE)
    assert not listed(caller).operations
    assert isinstance(error_of(lambda: get(caller, request_id="x")), NotFound)
    *_, last = sync(caller, "x")
    assert last.result.method == cp.SYNC_METHOD_UNCHANGED
    assert get(caller, request_id="x").operation_id == last.operation_id != ""


def test_an_end_that_the_ledger_refuses_is_told_and_written_later(
    caller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refusing(lambda change: change.row.ended > 0, patch)
        *_, last = sync(caller, "x")
        assert get(caller, request_id="x").sync == last.result
        assert list(sync(caller, "x"))[-1] == last
        assert not listed(caller, states=[cp.OPERATION_STATE_SUCCEEDED]).operations
    wait_until(lambda: listed(caller, states=[3]).operations, "the end on disk")
    assert get(caller, request_id="x").sync == last.result
