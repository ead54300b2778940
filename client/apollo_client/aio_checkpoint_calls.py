# `make protos` makes checkpoint_calls.py, the blocking client's calls, from this file.
"""Calls about the disk, and the ways back to what the model was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apollo_client.aio_calls import AsyncCalls
from apollo_client.connection import Told, message
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub


class AsyncCheckpointCalls(AsyncCalls):
    """What is done about the disk.

    `request_id`: the same id again attaches to what the first call began, until the server ends;
    `cancel_operation` stops it.
    """

    _checkpoints: CheckpointServiceStub

    async def sync(
        self, progress: Told | None = None, *, in_place: bool = False, request_id: str = ""
    ) -> pb.SyncResult:
        """Brings the model directory up to date with the live weights.

        Args:
            in_place: write into the files, for disks without room for new ones.
        """
        methods = (pb.SYNC_METHOD_UNSPECIFIED, pb.SYNC_METHOD_IN_PLACE)
        request = message(pb.SyncRequest, method=methods[in_place], request_id=request_id)
        result: pb.SyncResult = await self._result(self._checkpoints.Sync, request, progress)
        return result

    async def verify(
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
        result: pb.VerifyResult = await self._result(self._checkpoints.Verify, request, progress)
        return result

    async def adopt(
        self, directory: str | Path, progress: Told | None = None, *, request_id: str = ""
    ) -> pb.AdoptResult:
        """Makes a private copy of the model directory, in a new folder of the server's machine."""
        request = message(pb.AdoptRequest, directory=str(directory), request_id=request_id)
        result: pb.AdoptResult = await self._result(self._checkpoints.Adopt, request, progress)
        return result

    async def export(
        self, directory: str | Path, progress: Told | None = None, *, request_id: str = ""
    ) -> pb.ExportResult:
        """Writes the live weights as a new model directory on the server's machine.

        Raises AlreadyExists for a folder that exists.
        """
        request = message(pb.ExportRequest, directory=str(directory), request_id=request_id)
        result: pb.ExportResult = await self._result(self._checkpoints.Export, request, progress)
        return result

    async def create_snapshot(
        self, name: str = "", progress: Told | None = None, *, request_id: str = ""
    ) -> pb.Snapshot:
        """Keeps weights and Apollo state; returns once they are durable.

        Args:
            name: without one the snapshot is automatic, and newer ones may take its place.
        """
        request = message(pb.CreateSnapshotRequest, name=name, request_id=request_id)
        snapshot: pb.Snapshot = await self._result(
            self._checkpoints.CreateSnapshot, request, progress
        )
        return snapshot

    async def get_snapshot(self, snapshot: str) -> pb.Snapshot:
        """One snapshot, by id or name. Raises NotFound."""
        request = message(pb.GetSnapshotRequest, snapshot_id=snapshot)
        answer = await self._answer(self._checkpoints.GetSnapshot, request)
        found: pb.Snapshot = answer.snapshot
        return found

    async def list_snapshots(
        self, page_size: int = 0, page_token: str = ""
    ) -> pb.ListSnapshotsResponse:
        """A page of snapshots, newest first."""
        request = message(pb.ListSnapshotsRequest, page_size=page_size, page_token=page_token)
        page: pb.ListSnapshotsResponse = await self._answer(
            self._checkpoints.ListSnapshots, request
        )
        return page

    async def delete_snapshot(self, snapshot: str) -> None:
        """Deletes one, by id or name. Raises NotFound."""
        request = message(pb.DeleteSnapshotRequest, snapshot_id=snapshot)
        await self._answer(self._checkpoints.DeleteSnapshot, request)

    async def restore(
        self,
        snapshot: str,
        progress: Told | None = None,
        *,
        expected_weight_version: int | None = None,
        request_id: str = "",
    ) -> pb.RestoreResult:
        """Makes a snapshot, by id or name, the live weights and Apollo state, while vLLM serves.

        Raises Aborted where the live weights have another version than the expected one, NotFound,
        DataLoss where the snapshot is not what was written; nothing was changed then.
        """
        request = message(
            pb.RestoreSnapshotRequest,
            snapshot_id=snapshot,
            expected_weight_version=expected_weight_version,
            request_id=request_id,
        )
        result: pb.RestoreResult = await self._result(
            self._checkpoints.RestoreSnapshot, request, progress
        )
        return result

    async def undo(
        self,
        updates: int = 1,
        *,
        expected_weight_version: int | None = None,
        request_id: str = "",
    ) -> pb.RestoreResult:
        """Takes the last updates back, weights and Apollo state.

        Raises Aborted where the live weights have another version than the expected one, OutOfRange
        where the server keeps fewer.
        """
        request = message(
            pb.UndoRequest,
            updates=updates,
            expected_weight_version=expected_weight_version,
            request_id=request_id,
        )
        result: pb.RestoreResult = await self._result(self._checkpoints.Undo, request, None)
        return result

    async def cancel_operation(self, request_id: str) -> str:
        """Stops what the last call with this id began; returns at once.

        Returns `"CANCELLED"`, `"STOPPING"` (at its next progress; its own call tells), or
        `"TOO_LATE"`: it has ended, or writes live weights. Raises NotFound for an unknown id.
        """
        request = message(pb.CancelOperationRequest, request_id=request_id)
        answer = await self._answer(self._checkpoints.CancelOperation, request)
        return pb.CancelState.Name(answer.state).removeprefix("CANCEL_STATE_")

    async def _result(self, method: Any, request: Any, progress: Told | None) -> Any:
        """The last message's result of a stream that tells its progress before."""
        result = None
        async for response in self._stream(method, request):
            kind = response.WhichOneof("update")
            if kind != "progress":
                result = getattr(response, kind)
            elif progress:
                progress(response.progress)
        return result
