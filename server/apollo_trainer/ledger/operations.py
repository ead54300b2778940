"""Operations on checkpoints in the ledger: a row each, which is written again as it changes."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from apollo_grpc.errors import ApolloError
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import training_pb2
from apollo_trainer.ledger.file import transaction
from apollo_trainer.ledger.ledger import Ledger

# So many are kept, however young they are; some 500 bytes each.
KEPT_OPERATIONS = 10_000
OPERATIONS_A_PASS = 500
_INTERRUPTED = (
    "The training server was killed before this ended. The model directory, the snapshots and the "
    "live weights are each wholly as before or wholly new: 'apollo checkpoint verify' and 'apollo "
    "status' tell which. The same call with the same request_id begins it anew."
)


@dataclass(frozen=True)
class OperationRow:
    """One operation; times in nanoseconds since 1970, 0 where unset.

    Attributes:
        digest: by which two requests are compared.
        outcome: a serialized Operation that has nothing but its outcome.
        number: rises with each operation; 0 while it was not read from disk.
    """

    operation_id: str
    request_id: str | None
    kind: int
    digest: bytes
    created: int
    state: int = pb.OPERATION_STATE_WAITING
    started: int = 0
    ended: int = 0
    outcome: bytes = b""
    number: int = 0

    def to_operation(self) -> pb.Operation:
        """Converts to the API's message, without progress."""
        operation = pb.Operation.FromString(self.outcome)
        operation.operation_id, operation.request_id = self.operation_id, self.request_id or ""
        operation.kind = pb.OperationKind.ValueType(self.kind)
        operation.state = pb.OperationState.ValueType(self.state)
        times = (operation.create_time, operation.start_time, operation.end_time)
        for stamp, when in zip(times, (self.created, self.started, self.ended), strict=True):
            if when:
                stamp.FromNanoseconds(when)
        return operation


_COLUMNS = [column.name for column in fields(OperationRow)]
_WRITTEN = _COLUMNS[:-1]
_WRITE = (
    f"INSERT INTO operations ({', '.join(_WRITTEN)}) VALUES ({', '.join('?' * len(_WRITTEN))}) "
    "ON CONFLICT (operation_id) DO UPDATE SET state = excluded.state, started = excluded.started, "
    "ended = excluded.ended, outcome = excluded.outcome"
)


@dataclass(frozen=True)
class OperationChange:
    """A row to be written.

    Attributes:
        told: called without an error once it is on disk, and with one each time that it is refused.
            On the ledger's thread, or, while the server stops, the writer's caller's.
        again: it is tried until it is on disk; otherwise once, and at once.
    """

    row: OperationRow
    told: Callable[[ApolloError | None], None]
    again: bool = False

    def write(self, connection: sqlite3.Connection) -> None:
        """Inserts the row, or changes what is there."""
        connection.execute(_WRITE, [getattr(self.row, name) for name in _WRITTEN])


class KeptOperations:
    """Reads operations. Any thread but an event loop's; raises DataLoss as `Ledger` does."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger

    def by_id(self, operation_id: str) -> OperationRow | None:
        """Returns an operation by its id."""
        return next(iter(self._rows("WHERE operation_id = ?", operation_id)), None)

    def by_request(self, request_id: str) -> OperationRow | None:
        """Returns the operation that a request id began."""
        return next(iter(self._rows("WHERE request_id = ?", request_id)), None)

    def page(self, before: int, states: Sequence[int], size: int) -> list[OperationRow]:
        """Returns operations with a smaller number than `before`, newest first."""
        among = f" AND state IN ({', '.join('?' * len(states))})" if states else ""
        where = f"WHERE number < ?{among} ORDER BY number DESC LIMIT ?"
        return self._rows(where, before, *states, size)

    def _rows(self, where: str, *values: object) -> list[OperationRow]:
        found = self._ledger.fetch(f"SELECT {', '.join(_COLUMNS)} FROM operations {where}", *values)
        return [OperationRow(*row) for row in found]


def end_interrupted(connection: sqlite3.Connection) -> None:
    """Ends what a killed server had not ended. Before anybody writes; raises sqlite3.Error."""
    notice = training_pb2.Notice(reason="OPERATION_INTERRUPTED", message=_INTERRUPTED)
    outcome = pb.Operation(failure=notice).SerializeToString()
    with transaction(connection):
        connection.execute(
            "UPDATE operations SET state = ?, ended = ?, outcome = ? WHERE ended = 0",
            (pb.OPERATION_STATE_FAILED, time.time_ns(), outcome),
        )


def prune_operations(connection: sqlite3.Connection, before: int) -> bool:
    """Removes some that ended before a time; returns whether there may be more to remove."""
    pruned = connection.execute(
        "DELETE FROM operations WHERE number IN (SELECT number FROM operations WHERE ended > 0 AND "
        "(ended < ? OR number <= (SELECT MAX(number) FROM operations) - ?) LIMIT ?)",
        (before, KEPT_OPERATIONS, OPERATIONS_A_PASS),
    )
    return pruned.rowcount == OPERATIONS_A_PASS
