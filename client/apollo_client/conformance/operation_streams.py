"""What the streams of operations on checkpoints promise, whatever they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from apollo_client.conformance.refusals import refusal_of
from apollo_client.conformance.requirements import (
    NotApplicableError,
    require,
    require_equal,
    shown,
)
from apollo_client.conformance.server import Server, finished
from apollo_grpc.v1 import checkpoint_pb2 as cp

# The model directory, the disk or other callers do not let it be done.
REFUSING = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,
)


@dataclass(frozen=True)
class Done:
    """An operation that has ended well: its id, and what its stream's last message holds."""

    operation_id: str
    result: Any


def done(server: Server, request: Any) -> Done:
    """Has an operation done, and looks at its stream.

    Raises NotApplicableError where the server may not do it as it is.
    """
    what = request.DESCRIPTOR.name
    try:
        answers = list(server.stream(request))
    except grpc.RpcError as error:
        found = refusal_of(error, what)
        if found.code in REFUSING:
            raise NotApplicableError(f"{found.message} ({found.reason})") from error
        raise
    return _read(answers, what)


def _read(answers: list[Any], what: str) -> Done:
    ids = {answer.operation_id for answer in answers}
    require_equal(len(ids), 1, f"operation ids in one stream of {what}")
    if ids == {""}:
        raise NotApplicableError("the server's disk takes no record of operations")
    kinds = [answer.WhichOneof("update") for answer in answers]
    whole = [kind for kind in kinds if kind not in (None, "progress")]
    require(len(whole) == 1 and kinds[-1] == whole[0], f"messages of {what}: {kinds}")
    require(len(kinds) == 1 or kinds[0] is None, f"{what} begins with {kinds[0]}")
    for progress in (answer.progress for answer in answers[:-1]):
        require(0 <= progress.bytes_done <= progress.bytes_total, f"progress {shown(progress)}")
    return Done(ids.pop(), getattr(answers[-1], str(kinds[-1])))


def operation(server: Server, operation_id: str = "", request_id: str = "") -> cp.Operation:
    """An operation, by either id."""
    request = cp.GetOperationRequest(operation_id=operation_id, request_id=request_id)
    found: cp.Operation = server.ask(request).operation
    return found


def snapshot(server: Server, **fields: Any) -> cp.Snapshot:
    """A new snapshot, which is deleted at the end."""
    made: cp.Snapshot = done(server, cp.CreateSnapshotRequest(**fields)).result
    server.at_end.append(cp.DeleteSnapshotRequest(snapshot_id=made.snapshot_id))
    return made


def updated(server: Server, version: int) -> int:
    """The version of the weights after an update of this one; NotApplicableError for another."""
    events = list(server.begin(server.update(expected_weight_version=version)))
    ended = finished(events)
    if ended.failure.reason == "WEIGHT_VERSION_CHANGED":
        raise NotApplicableError("others train on this server meanwhile")
    require_equal(ended.steps_done, 1, "steps in the weights")
    return ended.weight_version
