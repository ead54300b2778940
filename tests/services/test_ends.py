"""Calls that wait for the end of a run: they hold up nobody, and the server's end ends them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from apollo_grpc.errors import ApolloError, NotFound
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG

MANY = 40
END_SECONDS = 10.0


def quickly(what: str, call: Callable[[], Any]) -> Any:
    """What a call returns; it must within a second."""
    began = time.monotonic()
    answer = call()
    assert time.monotonic() - began < 1, f"{what} took {time.monotonic() - began:.1f} s"
    return answer


def look(caller: Any, run_id: str) -> None:
    """Every call that only looks."""
    quickly("GetStatus", caller.status)
    quickly("GetRun", lambda: caller.run(run_id))
    quickly("ListRuns", caller.list)
    assert quickly("health", caller.serves)
    snapshots = caller.checkpoints.ListSnapshots
    quickly("ListSnapshots", lambda: snapshots(cp.ListSnapshotsRequest(), timeout=HANG))


def error_of_call(call: Any) -> ApolloError | None:
    try:
        call.result()
    except grpc.RpcError as error:
        return from_rpc_error(error)
    return None


@pytest.fixture
def beside(caller: Any, wait: Any) -> tuple[Any, str, list[Any]]:
    """A caller, its run at work, and the deletions that wait for it; as many callers have left."""
    list(caller.checkpoints.CreateSnapshot(cp.CreateSnapshotRequest(name="a"), timeout=HANG))
    run_id = next(caller.start(epochs=100_000)).event.run_id
    wait(lambda: caller.status().active_run_id == run_id, "the run")
    request = cp.DeleteSnapshotRequest(snapshot_id="a")
    calls = [
        caller.checkpoints.DeleteSnapshot.future(request, timeout=HANG) for _ in range(2 * MANY)
    ]
    quickly("GetStatus", caller.status)
    for left in calls[MANY:]:
        left.cancel()
    return caller, run_id, calls[:MANY]


def test_deletions_beside_a_run_hold_up_no_other_call(
    beside: tuple[Any, str, list[Any]],
) -> None:
    caller, run_id, deletions = beside
    look(caller, run_id)
    waiting = quickly("Train", lambda: next(caller.start("waiting"))).event.run_id
    assert quickly("CancelRun", lambda: caller.cancel(waiting)).state == pb.RUN_STATE_CANCELLED
    assert not any(call.done() for call in deletions)
    quickly("CancelRun", lambda: caller.cancel(run_id))
    errors = [error_of_call(call) for call in deletions]
    assert errors.count(None) <= 1
    assert all(error is None or isinstance(error, NotFound) for error in errors)
    assert not caller.checkpoints.ListSnapshots(cp.ListSnapshotsRequest(), timeout=HANG).snapshots


def test_the_end_of_the_server_waits_for_no_deletion_and_answers_all(
    beside: tuple[Any, str, list[Any]],
) -> None:
    caller, _, deletions = beside
    began = time.monotonic()
    caller.terminate()
    assert time.monotonic() - began < END_SECONDS
    errors = [error_of_call(call) for call in deletions]
    assert [error.reason for error in errors if error] == ["SERVER_STOPPING"] * MANY
