# `make protos` makes calls.py, the blocking client's calls, from this file.
"""Calls of all services; the client that they are part of says how one is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from apollo_client.aio_streams import AsyncRunStream, AsyncStream
from apollo_client.connection import Told, message
from apollo_client.lifetime import Lifetime
from apollo_client.placing import Place
from apollo_client.requests import (
    RunOptions,
    list_request,
    placed_spec,
    train_request,
    watch_request,
)
from apollo_client.resume import Patience, Resume
from apollo_client.samples import SampleLike
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import status_pb2, training_pb2
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub


class AsyncCalls:
    """Runs, the server's status, and what is done about the disk.

    `request_id`: the same id again attaches to what the first call began, until the server ends;
    `cancel_checkpoint` stops it.
    """

    _training: TrainingServiceStub
    _checkpoints: CheckpointServiceStub
    _status: StatusServiceStub
    _endpoint: Endpoint
    _lifetime: Lifetime
    _retry_seconds: float

    def train(
        self,
        samples: Iterable[SampleLike],
        *,
        request_id: str | None = None,
        **options: Unpack[RunOptions],
    ) -> AsyncRunStream:
        """Starts a run and returns its events; the last one is `finished`.

        The run begins now, and goes on when the stream is left. A run that fails raises nothing:
        its `finished` event says so. A step's loss is in `event.step.loss`.

        Args:
            request_id: the same id with the same spec attaches to the first run, also after a
                restart of either side; with another spec it raises AlreadyExists. None: a new one.
        """
        spec, places = placed_spec(samples, options)
        return self._follow(train_request(spec, request_id, places), places)

    def train_spec(
        self, spec: training_pb2.RunSpec, *, request_id: str | None = None
    ) -> AsyncRunStream:
        """The same for a spec that the caller built, with all that the contract has."""
        return self._follow(train_request(spec, request_id))

    def watch_run(self, run_id: str, after_sequence: int = 0) -> AsyncRunStream:
        """The events of a run after a sequence, until it has finished.

        Raises NotFound for a run that is not known, OutOfRange for events that were pruned.
        """
        request = message(
            training_pb2.WatchRunRequest, run_id=run_id, after_sequence=after_sequence
        )
        return self._follow(request)

    async def get_run(self, run_id: str) -> training_pb2.Run:
        """One run with its spec. Raises NotFound for one that is not known."""
        request = message(training_pb2.GetRunRequest, run_id=run_id)
        answer = await self._answer(self._training.GetRun, request)
        run: training_pb2.Run = answer.run
        return run

    async def list_runs(
        self, page_size: int = 0, page_token: str = "", states: Iterable[str | int] = ()
    ) -> training_pb2.ListRunsResponse:
        """A page of runs, newest first, their specs without samples.

        Args:
            page_token: `next_page_token` of the page before, for the same states.
            states: only runs in one of these, such as `"FAILED"`; empty means all.
        """
        request = list_request(page_size, page_token, states)
        page: training_pb2.ListRunsResponse = await self._answer(self._training.ListRuns, request)
        return page

    async def cancel_run(self, run_id: str) -> training_pb2.Run:
        """Asks a run to stop, and returns at once; a run that has ended stays as it ended."""
        request = message(training_pb2.CancelRunRequest, run_id=run_id)
        answer = await self._answer(self._training.CancelRun, request)
        run: training_pb2.Run = answer.run
        return run

    async def status(self) -> status_pb2.ServerStatus:
        """How the server is now."""
        request = status_pb2.GetStatusRequest()
        answer = await self._answer(self._status.GetStatus, request)
        status: status_pb2.ServerStatus = answer.status
        return status

    def watch(
        self, run_id: str = "", min_interval: float = 0.0
    ) -> AsyncStream[status_pb2.WatchStatusResponse]:
        """The status first, then events of runs and changes of status, as they happen.

        Args:
            run_id: only events of this run; empty means all.
            min_interval: seconds between two statuses; events are not held back.
        """
        request = watch_request(run_id, min_interval)
        return self._stream(self._status.WatchStatus, request)

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

    async def cancel_checkpoint(self, request_id: str) -> str:
        """Stops what the last call with this id began; returns at once.

        Returns `"CANCELLED"`, `"STOPPING"` (at its next progress; its own call tells), or
        `"TOO_LATE"`: it has ended, or writes live weights. Raises NotFound for an unknown id.
        """
        request = message(pb.CancelCheckpointRequest, request_id=request_id)
        answer = await self._answer(self._checkpoints.CancelCheckpoint, request)
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

    def _follow(
        self,
        request: training_pb2.TrainRequest | training_pb2.WatchRunRequest,
        places: Sequence[Place] = (),
    ) -> AsyncRunStream:
        resume = Resume(request, self._retry_seconds, places)
        return AsyncRunStream(self._begin, self._training, resume, self._endpoint, self._lifetime)

    def _stream(self, method: Any, request: Any) -> AsyncStream[Any]:
        call, patience = partial(self._begin, method, request), Patience(self._retry_seconds)
        return AsyncStream(
            call, patience, self._endpoint, self._lifetime, lambda response: response
        )

    def _begin(self, method: Any, request: Any, **options: Any) -> Any:
        raise NotImplementedError

    async def _answer(self, method: Any, request: Any) -> Any:
        raise NotImplementedError
