# Generated from aio_checkpoint_calls.py by `make protos`: change that file, not this one.
"""Calls about the disk, and the ways back to what the model was."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apollo_client.calls import Calls
from apollo_client.connection import Told, message
from apollo_client.fields import put
from apollo_client.resume import OperationEndurance
from apollo_client.streams import Stream
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub


class CheckpointCalls(Calls):
    """What is done about the disk.

    Each call is an operation, which goes on when its caller leaves. `request_id`: the same call
    with the same id, of whomever, follows the first one and has its result, also after a restart
    of the server; one that failed or was cut off begins anew. With another call it raises
    AlreadyExists. A call whose server goes away is made again with its id, for `retry_seconds`.

    `progress` is called with each Operation.Progress.

    `expected_weight_version`: raises Aborted, with nothing done, where the live weights have
    another one.
    """

    _checkpoints: CheckpointServiceStub

    def sync(
        self,
        progress: Told | None = None,
        *,
        in_place: bool = False,
        expected_weight_version: int | None = None,
        request_id: str = "",
    ) -> pb.SyncResult:
        """Brings the model directory up to date with the live weights.

        Args:
            in_place: write into the files, for disks without room for new ones.
        """
        methods = (pb.SYNC_METHOD_UNSPECIFIED, pb.SYNC_METHOD_IN_PLACE)
        request = message(
            pb.SyncRequest,
            method=methods[in_place],
            expected_weight_version=expected_weight_version,
            request_id=request_id,
        )
        result: pb.SyncResult = self._result(self._checkpoints.Sync, request, progress)
        return result

    def verify(
        self,
        *,
        full: bool = False,
        live: bool = False,
        progress: Told | None = None,
        request_id: str = "",
    ) -> pb.VerifyResult:
        """Compares the model directory with what the last sync left there.

        Args:
            full: read every file, and compare digests.
            live: compare the live weights too.
        """
        request = message(pb.VerifyRequest, full=full, live=live, request_id=request_id)
        result: pb.VerifyResult = self._result(self._checkpoints.Verify, request, progress)
        return result

    def adopt(
        self, directory: str | Path, progress: Told | None = None, *, request_id: str = ""
    ) -> pb.AdoptResult:
        """Makes a private copy of the model directory, in a new folder of the server's machine."""
        request = message(pb.AdoptRequest, directory=str(directory), request_id=request_id)
        result: pb.AdoptResult = self._result(self._checkpoints.Adopt, request, progress)
        return result

    def export(
        self,
        directory: str | Path,
        progress: Told | None = None,
        *,
        expected_weight_version: int | None = None,
        request_id: str = "",
    ) -> pb.ExportResult:
        """Writes the live weights as a new model directory on the server's machine.

        Raises AlreadyExists for a folder that exists.
        """
        request = message(
            pb.ExportRequest,
            directory=str(directory),
            expected_weight_version=expected_weight_version,
            request_id=request_id,
        )
        result: pb.ExportResult = self._result(self._checkpoints.Export, request, progress)
        return result

    def create_snapshot(
        self,
        name: str = "",
        progress: Told | None = None,
        *,
        expected_weight_version: int | None = None,
        request_id: str = "",
    ) -> pb.Snapshot:
        """Keeps weights and Apollo state; returns once they are durable.

        Args:
            name: without one the snapshot is automatic, and newer ones may take its place.
        """
        request = message(
            pb.CreateSnapshotRequest,
            name=name,
            expected_weight_version=expected_weight_version,
            request_id=request_id,
        )
        snapshot: pb.Snapshot = self._result(self._checkpoints.CreateSnapshot, request, progress)
        return snapshot

    def get_snapshot(self, snapshot: str) -> pb.Snapshot:
        """One snapshot, by id or name. Raises NotFound."""
        request = message(pb.GetSnapshotRequest, snapshot_id=snapshot)
        answer = self._answer(self._checkpoints.GetSnapshot, request)
        found: pb.Snapshot = answer.snapshot
        return found

    def list_snapshots(self, page_size: int = 0, page_token: str = "") -> pb.ListSnapshotsResponse:
        """A page of snapshots, newest first."""
        request = message(pb.ListSnapshotsRequest, page_size=page_size, page_token=page_token)
        page: pb.ListSnapshotsResponse = self._answer(self._checkpoints.ListSnapshots, request)
        return page

    def delete_snapshot(self, snapshot: str, *, request_id: str = "") -> None:
        """Deletes one, by id or name. Raises NotFound."""
        request = message(pb.DeleteSnapshotRequest, snapshot_id=snapshot, request_id=request_id)
        self._answer(self._checkpoints.DeleteSnapshot, request)

    def restore(
        self,
        snapshot: str,
        progress: Told | None = None,
        *,
        expected_weight_version: int | None = None,
        request_id: str = "",
    ) -> pb.RestoreResult:
        """Makes a snapshot, by id or name, the live weights and Apollo state, while vLLM serves.

        Raises NotFound, DataLoss where the snapshot is not what was written; nothing was changed
        then.
        """
        request = message(
            pb.RestoreSnapshotRequest,
            snapshot_id=snapshot,
            expected_weight_version=expected_weight_version,
            request_id=request_id,
        )
        result: pb.RestoreResult = self._result(
            self._checkpoints.RestoreSnapshot, request, progress
        )
        return result

    def undo(
        self,
        updates: int = 1,
        *,
        expected_weight_version: int | None = None,
        request_id: str = "",
    ) -> pb.RestoreResult:
        """Takes the last updates back, weights and Apollo state.

        Raises OutOfRange where the server keeps fewer.
        """
        request = message(
            pb.UndoRequest,
            updates=updates,
            expected_weight_version=expected_weight_version,
            request_id=request_id,
        )
        result: pb.RestoreResult = self._result(self._checkpoints.Undo, request, None)
        return result

    def operation(self, operation_id: str = "", *, request_id: str = "") -> pb.Operation:
        """One operation, by one of its ids. Raises NotFound."""
        request = message(pb.GetOperationRequest, operation_id=operation_id, request_id=request_id)
        answer = self._answer(self._checkpoints.GetOperation, request)
        found: pb.Operation = answer.operation
        return found

    def operations(
        self, page_size: int = 0, page_token: str = "", states: Iterable[str] = ()
    ) -> pb.ListOperationsResponse:
        """A page of operations, newest first.

        Args:
            page_token: `next_page_token` of the page before.
            states: only those in one of these, such as `"running"`; empty means all.
        """
        request = message(pb.ListOperationsRequest, page_size=page_size, page_token=page_token)
        put(request, "states", states)
        page: pb.ListOperationsResponse = self._answer(self._checkpoints.ListOperations, request)
        return page

    def watch_operation(
        self, operation_id: str = "", *, request_id: str = ""
    ) -> Stream[pb.WatchOperationResponse]:
        """One operation, by one of its ids: as it is, then as it changes, until it has ended.

        Raises NotFound. One that fails raises nothing: its state and its `failure` say so.
        """
        request = message(
            pb.WatchOperationRequest, operation_id=operation_id, request_id=request_id
        )
        return self._stream(self._checkpoints.WatchOperation, request)

    def cancel_operation(self, operation_id: str = "", *, request_id: str = "") -> str:
        """Stops an operation, by one of its ids; returns at once.

        Returns `"CANCELLED"`, `"STOPPING"` (at its next progress; its own call tells), or
        `"TOO_LATE"`: it has ended, or writes live weights. Raises NotFound.
        """
        request = message(
            pb.CancelOperationRequest, operation_id=operation_id, request_id=request_id
        )
        answer = self._answer(self._checkpoints.CancelOperation, request)
        return pb.CancelState.Name(answer.state).removeprefix("CANCEL_STATE_")

    def _result(self, method: Any, request: Any, progress: Told | None) -> Any:
        """The last message's result of a stream that tells its progress before.

        Its id lets it go on with a server that was started again.
        """
        result = None
        request.request_id = request.request_id or uuid.uuid4().hex
        for response in self._stream(method, request, OperationEndurance):
            kind = response.WhichOneof("update")
            if kind == "progress":
                if progress:
                    progress(response.progress)
            elif kind:
                result = getattr(response, kind)
        return result
