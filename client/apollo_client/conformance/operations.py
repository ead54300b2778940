"""Operations on checkpoints: found by whomever, one for a request id, watched, cancelled."""

from __future__ import annotations

import grpc

from apollo_client.conformance.operation_streams import done, operation, snapshot
from apollo_client.conformance.paging import require_newest_first
from apollo_client.conformance.promises import Level, promise
from apollo_client.conformance.refusals import refusal_of
from apollo_client.conformance.requirements import BrokenPromiseError, require, require_equal
from apollo_client.conformance.server import Server
from apollo_grpc.v1 import checkpoint_pb2 as cp

TAKEN = grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_TAKEN"


@promise(Level.CHECKPOINTS)
def an_operation_is_found_by_either_id(server: Server) -> None:
    """GetOperation returns an operation, by its id or its request id, with state and outcome."""
    request_id = server.name()
    ended = done(server, cp.SyncRequest(request_id=request_id))
    found = operation(server, ended.operation_id)
    require_equal(operation(server, request_id=request_id), found, "by its request id")
    require_equal(found.kind, cp.OPERATION_KIND_SYNC, "kind")
    require_equal(found.state, cp.OPERATION_STATE_SUCCEEDED, "state")
    require_equal(found.sync, ended.result, "outcome")
    times = [t.ToNanoseconds() for t in (found.create_time, found.start_time, found.end_time)]
    require(0 < times[0] <= times[1] <= times[2], f"created, started, ended at {times}")
    require(not found.HasField("progress"), "progress of one that has ended")


@promise(Level.CHECKPOINTS)
def the_same_request_is_one_operation(server: Server) -> None:
    """The same request id for the same operation tells the first one's result."""
    request = cp.CreateSnapshotRequest(request_id=server.name(), name=server.name())
    first = done(server, request)
    server.at_end.append(cp.DeleteSnapshotRequest(snapshot_id=first.result.snapshot_id))
    require_equal(done(server, request), first, "the second time")


@promise(Level.CHECKPOINTS)
def another_operation_is_another_request(server: Server) -> None:
    """A request id for another operation is ALREADY_EXISTS (REQUEST_ID_TAKEN)."""
    request_id = server.name()
    first = done(server, cp.SyncRequest(request_id=request_id))
    for request in (
        cp.SyncRequest(request_id=request_id, method=cp.SYNC_METHOD_ROLLFORWARD),
        cp.CreateSnapshotRequest(request_id=request_id),
    ):
        found = server.refused(request, *TAKEN)
        require_equal(found.resource, first.operation_id, "the name in ResourceInfo")


@promise(Level.CHECKPOINTS)
def a_deletion_is_an_operation(server: Server) -> None:
    """DeleteSnapshot is an operation: by its request id it is found, and asked for again."""
    name, request_id = snapshot(server).snapshot_id, server.name()
    for _ in range(2):
        server.ask(cp.DeleteSnapshotRequest(snapshot_id=name, request_id=request_id))
    found = operation(server, request_id=request_id)
    require_equal(found.kind, cp.OPERATION_KIND_DELETE_SNAPSHOT, "kind")
    require_equal(found.WhichOneof("outcome"), None, "outcome")


@promise(Level.CHECKPOINTS)
def pages_of_operations_join_to_the_whole(server: Server) -> None:
    """ListOperations lists newest first; its pages join to the whole."""
    made = [done(server, cp.SyncRequest()).operation_id for _ in range(3)]
    states = [cp.OPERATION_STATE_SUCCEEDED]
    request = cp.ListOperationsRequest(states=states)
    require_newest_first(server, request, "operations", "operation_id", made)


@promise(Level.CHECKPOINTS)
def an_operation_is_watched_to_its_end(server: Server) -> None:
    """WatchOperation streams an operation as it is now, then as it changes, until it has ended."""
    with server.long() as run_id:
        call = server.stream(cp.SyncRequest())
        operation_id = next(call).operation_id
        watched = server.stream(cp.WatchOperationRequest(operation_id=operation_id))
        first = next(watched).operation
        server.end(run_id)
        told = [first, *(answer.operation for answer in watched)]
    list(call)
    states = [each.state for each in told]
    require_equal(states[0], cp.OPERATION_STATE_WAITING, "the state behind a run")
    require_equal(states[-1], cp.OPERATION_STATE_SUCCEEDED, "the last state")
    require_equal(states, sorted(states), "states in the order of a life")
    require_equal(told[-1], operation(server, operation_id), "the last one, and GetOperation")


@promise(Level.CHECKPOINTS)
def an_operation_that_waits_is_cancelled(server: Server) -> None:
    """CancelOperation stops an operation: its stream ends with CANCELLED (JOB_CANCELLED)."""
    request_id = server.name()
    with server.long():
        call = server.stream(cp.SyncRequest(request_id=request_id))
        operation_id = next(call).operation_id
        answer = server.ask(cp.CancelOperationRequest(request_id=request_id))
        require_equal(answer.state, cp.CANCEL_STATE_CANCELLED, "what CancelOperation says")
        try:
            told = list(call)
        except grpc.RpcError as error:
            found = refusal_of(error, "Sync")
        else:
            raise BrokenPromiseError(f"the stream ended well: {told}")
    expected = grpc.StatusCode.CANCELLED, "JOB_CANCELLED"
    require_equal((found.code, found.reason), expected, "how the stream ended")
    state = operation(server, operation_id).state
    require_equal(state, cp.OPERATION_STATE_CANCELLED, "the state")
    again = done(server, cp.SyncRequest(request_id=request_id)).operation_id
    require_equal(again, operation_id, "the id of what begins anew under its request id")


@promise(Level.CHECKPOINTS)
def what_has_ended_is_too_late_to_cancel(server: Server) -> None:
    """CancelOperation is idempotent; of what has ended it says CANCEL_STATE_TOO_LATE."""
    operation_id = done(server, cp.SyncRequest()).operation_id
    before = operation(server, operation_id)
    for _ in range(2):
        answer = server.ask(cp.CancelOperationRequest(operation_id=operation_id))
        require_equal(answer.state, cp.CANCEL_STATE_TOO_LATE, "what CancelOperation says")
        require_equal(answer.operation, before, "the operation")
