"""Operations on checkpoints of a fake server: begun, followed, found, cancelled."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from operator import ne
from typing import Any

from apollo_client.testing.checks import check_request_id
from apollo_client.testing.memory import WEIGHT_BYTES, KeptOperation, Memory, not_found
from apollo_client.testing.paging import page_of, refuse, wrong_page, wrong_states
from apollo_client.testing.playing import ServerEnded
from apollo_grpc.errors import AlreadyExists, ApolloError, Cancelled, InvalidArgument, Resource
from apollo_grpc.times import now
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2

PARTS = 4
FRESH = ("start_time", "end_time", "progress", "failure")
ENDED = (cp.OPERATION_STATE_SUCCEEDED, cp.OPERATION_STATE_FAILED, cp.OPERATION_STATE_CANCELLED)
UNDONE = (cp.OPERATION_STATE_FAILED, cp.OPERATION_STATE_CANCELLED)


class Operations:
    """Each method without an underscore is an RPC by its name."""

    def __init__(self, memory: Memory):
        self._memory = memory

    # --- begun and followed -------------------------------------------------------------------

    def _begin(
        self, kind: cp.OperationKind.ValueType, request: Any, work: Callable[[], Any]
    ) -> KeptOperation:
        check_request_id(request.request_id)
        memory = self._memory
        with memory.changed:
            kept = self._of_request(request.request_id)
            if kept is None:
                message = cp.Operation(
                    operation_id=uuid.uuid4().hex, request_id=request.request_id, kind=kind
                )
                kept = KeptOperation(memory.number(), message, request, work)
                memory.operations[message.operation_id] = kept
            elif kept.request != request:
                raise AlreadyExists(
                    "This request_id began another operation; nothing was done.",
                    reason="REQUEST_ID_TAKEN",
                    resource=Resource("operation", kept.message.operation_id),
                )
            elif kept.message.state not in UNDONE:
                return kept
            self._queue(kept, work)
        return kept

    def _queue(self, kept: KeptOperation, work: Callable[[], Any]) -> None:
        for name in FRESH:
            kept.message.ClearField(name)  # type: ignore[arg-type]
        kept.error, kept.cancelled, kept.work = None, False, work
        kept.message.state = cp.OPERATION_STATE_WAITING
        kept.message.create_time.CopyFrom(now())
        self._memory.jobs.append(kept)
        self._memory.wake()

    def _follow(self, kept: KeptOperation, context: Any) -> Iterator[cp.Operation]:
        """The operation as it is, and each time that it has changed, until it has ended."""
        told = cp.Operation()
        while told.state not in ENDED:
            with self._memory.changed:
                if not self._memory.wait(partial(ne, kept.message, told), context):
                    return
                told = cp.Operation()
                told.CopyFrom(kept.message)
            yield told

    # --- RPCs ---------------------------------------------------------------------------------

    def get_operation(
        self, request: cp.GetOperationRequest, context: Any
    ) -> cp.GetOperationResponse:
        """One operation."""
        with self._memory.changed:
            return cp.GetOperationResponse(operation=self._named(request).message)

    def list_operations(
        self, request: cp.ListOperationsRequest, context: Any
    ) -> cp.ListOperationsResponse:
        """A page of operations."""
        refuse(wrong_page(request) + wrong_states(request.states, cp.OperationState))
        with self._memory.changed:
            kept = self._memory.operations.values()
            chosen = [k for k in kept if not request.states or k.message.state in request.states]
            page, token = page_of(chosen, lambda each: each.number, request)
            found = [each.message for each in page]
            return cp.ListOperationsResponse(operations=found, next_page_token=token)

    def watch_operation(
        self, request: cp.WatchOperationRequest, context: Any
    ) -> Iterator[cp.WatchOperationResponse]:
        """An operation until it has ended."""
        for seen in self._follow(self._named(request), context):
            yield cp.WatchOperationResponse(operation=seen)

    def cancel_operation(
        self, request: cp.CancelOperationRequest, context: Any
    ) -> cp.CancelOperationResponse:
        """Stops an operation that waits, or that runs at its next progress."""
        with self._memory.changed:
            kept, state = self._named(request), cp.CANCEL_STATE_TOO_LATE
            if kept in self._memory.jobs:
                self._memory.jobs.remove(kept)
                state = cp.CANCEL_STATE_CANCELLED
                end(self._memory, kept, _cancelled())
            elif kept.message.state not in ENDED:
                kept.cancelled, state = True, cp.CANCEL_STATE_STOPPING
                self._memory.wake()
            return cp.CancelOperationResponse(state=state, operation=kept.message)

    def _of_request(self, request_id: str) -> KeptOperation | None:
        kept = self._memory.operations.values()
        return next((k for k in kept if request_id and k.message.request_id == request_id), None)

    def _named(self, request: Any) -> KeptOperation:
        if bool(request.operation_id) == bool(request.request_id):
            says = "name the operation by this or by its request_id, and by one alone"
            raise InvalidArgument.at("operation_id", says)
        kept = self._memory.operations.get(request.operation_id)
        found = kept or self._of_request(request.request_id)
        if found is None:
            raise not_found("operation", request.operation_id or request.request_id)
        return found


def carry_out(memory: Memory, kept: KeptOperation, ended: threading.Event) -> None:
    """Does the work of an operation. On the server's own thread.

    Raises ServerEnded, with the operation left as it is, where the server is stopped.
    """
    with memory.changed:
        kept.message.state = cp.OPERATION_STATE_RUNNING
        kept.message.start_time.CopyFrom(now())
        memory.wake()
    try:
        for part in range(1, PARTS + 1):
            _go_on(memory, kept, ended, part)
        with memory.changed:
            end(memory, kept, None, kept.work())
    except ApolloError as error:
        end(memory, kept, error)


def _go_on(memory: Memory, kept: KeptOperation, ended: threading.Event, part: int) -> None:
    """Tells progress after a while."""
    with memory.changed:
        memory.changed.wait_for(
            lambda: kept.cancelled or ended.is_set(), memory.script.step_seconds
        )
        if ended.is_set():
            raise ServerEnded
        if kept.cancelled:
            raise _cancelled()
        done = WEIGHT_BYTES * part // PARTS
        kept.message.progress.MergeFrom(
            cp.Operation.Progress(bytes_done=done, bytes_total=WEIGHT_BYTES, current="weights")
        )
        memory.wake()


def end(
    memory: Memory, kept: KeptOperation, error: ApolloError | None, outcome: Any = None
) -> None:
    """Ends an operation, with an error or with its outcome: the name of a field and a message."""
    with memory.changed:
        kept.error, message = error, kept.message
        message.ClearField("progress")
        message.end_time.CopyFrom(now())
        if not message.HasField("start_time"):
            message.start_time.CopyFrom(message.end_time)
        message.state = cp.OPERATION_STATE_SUCCEEDED
        if error:
            message.state = cp.OPERATION_STATE_FAILED
            if isinstance(error, Cancelled):
                message.state = cp.OPERATION_STATE_CANCELLED
            notice = training_pb2.Notice(reason=error.reason, message=error.message)
            message.failure.CopyFrom(notice)
        elif outcome:
            name, result = outcome
            getattr(message, name).CopyFrom(result)
        memory.wake()


def _cancelled() -> Cancelled:
    return Cancelled("The operation was cancelled; nothing was changed.", reason="JOB_CANCELLED")
