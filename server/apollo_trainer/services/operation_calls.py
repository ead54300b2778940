"""The calls about operations: one is found, listed, watched and cancelled, whoever began it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from apollo_grpc.errors import FieldViolation, InvalidArgument, NotFound, Resource
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import checkpoint_pb2_grpc as pb_grpc
from apollo_trainer.operations import Operation, Operations
from apollo_trainer.services.checkpoint_results import cancel_state
from apollo_trainer.services.paging import DEFAULT_SIZE, MAX_SIZE
from apollo_trainer.services.streams import StreamLimit

WATCH_SECONDS = 0.1
# Above any operation's number.
_ALL = 2**63 - 1


class OperationCalls(pb_grpc.CheckpointServiceServicer):
    """Serves the operations of one server; on their event loop.

    Args:
        readers: limits those that watch.
    """

    def __init__(self, operations: Operations, readers: StreamLimit):
        self._operations, self._readers = operations, readers

    async def GetOperation(  # noqa: N802
        self, request: pb.GetOperationRequest, context: Any
    ) -> pb.GetOperationResponse:
        """One operation."""
        operation = await self._named(request)
        return pb.GetOperationResponse(operation=operation.message())

    async def ListOperations(  # noqa: N802
        self, request: pb.ListOperationsRequest, context: Any
    ) -> pb.ListOperationsResponse:
        """A page of operations; its token is the number of its last one."""
        before = _page_begin(request)
        size = min(request.page_size or DEFAULT_SIZE, MAX_SIZE)
        rows = await self._operations.page(before, sorted(set(request.states)), size + 1)
        page = rows[:size]
        return pb.ListOperationsResponse(
            operations=[self._operations.shown(row) for row in page],
            next_page_token=str(page[-1].number) if len(rows) > size else "",
        )

    async def WatchOperation(  # noqa: N802
        self, request: pb.WatchOperationRequest, context: Any
    ) -> AsyncIterator[pb.WatchOperationResponse]:
        """Streams an operation until it has ended."""
        with self._readers.one(context.peer()):
            operation = await self._named(request)
            async for seen in operation.follow(WATCH_SECONDS):
                yield pb.WatchOperationResponse(operation=seen)

    async def CancelOperation(  # noqa: N802
        self, request: pb.CancelOperationRequest, context: Any
    ) -> pb.CancelOperationResponse:
        """Stops an operation, where that can be."""
        operation = await self._named(request)
        heeded, ended = operation.cancel()
        seen = operation.message()
        if ended:
            async for last in operation.follow():
                seen = last
        return pb.CancelOperationResponse(state=cancel_state(heeded, ended), operation=seen)

    async def _named(self, request: Any) -> Operation:
        """What a request names. Raises InvalidArgument unless by one id, NotFound."""
        if bool(request.operation_id) == bool(request.request_id):
            raise InvalidArgument.at(
                "operation_id", "name the operation by this or by its request_id, and by one alone"
            )
        found = await self._operations.find(request.operation_id, request.request_id)
        if found is None:
            raise NotFound(
                f"There is no operation with the id {_id_of(request)!r}; nothing was done. "
                "'apollo checkpoint operations' lists those that are kept.",
                reason="OPERATION_NOT_FOUND",
                resource=Resource("operation", _id_of(request)),
            )
        return found


def _id_of(request: Any) -> str:
    """The id that a request gives, as far as it is worth showing."""
    return str(request.operation_id or request.request_id)[:60]


def _page_begin(request: pb.ListOperationsRequest) -> int:
    """The number that a page lies below. Raises InvalidArgument with each wrong field."""
    token, violations = request.page_token, []
    if request.page_size < 0:
        violations.append(FieldViolation("page_size", "must not be negative"))
    for index, state in enumerate(request.states):
        if not state or state not in pb.OperationState.values():
            violations.append(FieldViolation(f"states[{index}]", f"is {state}, which is no state"))
    # A longer number is larger than SQLite's.
    if token and not (token.isascii() and token.isdecimal() and len(token) < len(str(_ALL))):
        violations.append(FieldViolation("page_token", "is none that this server gave"))
    if violations:
        first = violations[0]
        raise InvalidArgument(f"{first.field}: {first.description}", violations=violations)
    return int(token) if token else _ALL
