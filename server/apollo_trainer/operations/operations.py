"""Operations on checkpoints: begun, found again by id and by request id, and kept."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial

from apollo_grpc.errors import AlreadyExists, InvalidArgument, Quota, Resource, ResourceExhausted
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import status_pb2
from apollo_trainer.engine import ModelOwner, StatusBoard
from apollo_trainer.ledger import (
    KeptOperations,
    Ledger,
    LedgerWriter,
    OperationChange,
    OperationRow,
)
from apollo_trainer.operations.operation import Asked, Operation

MAX_ID_BYTES = 256
# That wait or are at work: each holds memory, also once its caller has left.
MAX_LIVE = 1024
RETRY_SECONDS = 1.0


class Operations:
    """All operations of one server. Coroutines are for one event loop; no thread waits for them.

    Args:
        owner: has a session where one may begin.
        board: shows the one at work.
        ledger, writer: read and write those that are kept.
    """

    def __init__(self, owner: ModelOwner, board: StatusBoard, ledger: Ledger, writer: LedgerWriter):
        self._owner, self._board, self._writer = owner, board, writer
        self._kept = KeptOperations(ledger)
        # From a call's look for an earlier one until it is among the live ones itself.
        self._accepting = asyncio.Lock()
        self._lock, self._live = threading.Lock(), list[Operation]()

    async def begin(self, asked: Asked) -> Operation:
        """The operation that a call begins, or that the first one with its request id began.

        It is on disk, or without an id. One that failed or was cancelled is begun anew, under the
        same id. Raises AlreadyExists where that request was another, InvalidArgument for a request
        id that is too long, ResourceExhausted at `MAX_LIVE`, and as `ModelOwner.session`.
        """
        async with self._accepting:
            operation = await self._known(asked)
            if operation is None or operation.failed:
                operation = self._accept(asked, operation.row if operation else None)
        await asyncio.wrap_future(operation.begun)
        return operation

    async def _known(self, asked: Asked) -> Operation | None:
        request_id = asked.request.request_id
        if len(request_id.encode()) > MAX_ID_BYTES:
            raise InvalidArgument.at("request_id", f"must have at most {MAX_ID_BYTES} bytes")
        found = await self.find(request_id=request_id)
        if found and found.row.digest != asked.digest:
            raise AlreadyExists(
                "This request_id began another operation; nothing was done. Send a new one, or "
                "none.",
                reason="REQUEST_ID_TAKEN",
                metadata={"operation_id": found.row.operation_id},
                resource=Resource("operation", found.row.operation_id),
            )
        return found

    def _accept(self, asked: Asked, before: OperationRow | None) -> Operation:
        self._owner.session()
        row = OperationRow(
            (before and before.operation_id) or uuid.uuid4().hex,
            asked.request.request_id or None,
            asked.kind,
            asked.digest,
            before.created if before else time.time_ns(),
        )
        operation = Operation(row, self)
        with self._lock:
            if len(self._live) >= MAX_LIVE:
                raise _too_many()
            self._live.append(operation)
        operation.begin(asked)
        return operation

    async def find(self, operation_id: str = "", request_id: str = "") -> Operation | None:
        """The operation with the one id that is given; None where none has it."""
        read: Callable[[], OperationRow | None]
        if operation_id:
            read = partial(self._kept.by_id, operation_id)
        elif request_id:
            read = partial(self._kept.by_request, request_id)
        else:
            return None
        while (found := self._find_live(operation_id, request_id)) is None:
            row = await asyncio.to_thread(read)
            if row is None:
                return None
            # One that had not ended when it was read is among the live ones, or has ended since.
            if row.ended:
                return Operation(row, self)
        await asyncio.wrap_future(found.begun)
        return found

    def _find_live(self, operation_id: str, request_id: str) -> Operation | None:
        name = "operation_id" if operation_id else "request_id"
        with self._lock:
            # The last one, where one that failed was begun anew.
            newest = reversed(self._live)
            value = operation_id or request_id
            return next((each for each in newest if getattr(each.row, name) == value), None)

    async def page(self, before: int, states: Sequence[int], size: int) -> list[OperationRow]:
        """The rows of operations with a smaller number than `before`, newest first."""
        return await asyncio.to_thread(self._kept.page, before, states, size)

    def shown(self, row: OperationRow) -> pb.Operation:
        """A row of a page with its progress, where it is at work."""
        operation, live = row.to_operation(), self._find_live(row.operation_id, "")
        if live and row.state == pb.OPERATION_STATE_RUNNING:
            operation.MergeFrom(pb.Operation(progress=live.progress))
        return operation

    # --- the operations' side, on any thread ------------------------------------------------

    def keep(self, change: OperationChange) -> None:
        """Queues a change of a row for writing."""
        self._writer.keep(change)

    def forget(self, operation: Operation) -> None:
        """Lets go of one whose end is on disk."""
        with self._lock:
            if operation in self._live:
                self._live.remove(operation)

    def work_changed(self) -> None:
        """Shows which one is at work."""
        self._board.update(self._show_active)

    def _show_active(self, status: status_pb2.ServerStatus) -> None:
        with self._lock:
            at_work = [each.row.operation_id for each in self._live if each.at_work]
        status.active_operation_id = next(filter(None, at_work), "")


def _too_many() -> ResourceExhausted:
    return ResourceExhausted(
        f"{MAX_LIVE} operations wait, which is the limit; nothing was done. Cancel some, or try "
        "again.",
        reason="TOO_MANY_OPERATIONS",
        metadata={"limit": str(MAX_LIVE)},
        quota=Quota("operations", f"at most {MAX_LIVE}"),
        retry_seconds=RETRY_SECONDS,
    )
