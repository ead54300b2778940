"""CheckpointService: sync, snapshots, undo, restore and export of the one model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_trainer.checkpoints.directory import SyncMethod
from apollo_trainer.engine import ModelOwner
from apollo_trainer.operations import (
    Asked,
    CheckpointJobs,
    Operations,
    find_snapshot,
    refused_by_disk,
)
from apollo_trainer.services import checkpoint_results as results
from apollo_trainer.services.allowed_folders import AllowedFolders
from apollo_trainer.services.checkpoint_results import outcome_of
from apollo_trainer.services.operation_calls import OperationCalls
from apollo_trainer.services.paging import DEFAULT_SIZE, MAX_SIZE
from apollo_trainer.services.streams import StreamLimit

T = TypeVar("T")


class CheckpointService(OperationCalls):
    """Serves the one model of `owner`; what a call began is finished when its caller leaves.

    On its event loop: no thread waits for a job's end.
    """

    def __init__(
        self,
        owner: ModelOwner,
        jobs: CheckpointJobs,
        operations: Operations,
        streams: StreamLimit,
        readers: StreamLimit,
        folders: AllowedFolders,
    ):
        super().__init__(operations, readers)
        self._owner, self._jobs, self._streams = owner, jobs, streams
        self._folders = folders

    async def Sync(  # noqa: N802
        self, request: pb.SyncRequest, context: Any
    ) -> AsyncIterator[pb.SyncResponse]:
        """Streams progress, then the result."""
        method, expected = _asked_method(request.method), _expected(request)
        start = partial(self._jobs.sync, method=method, expected_version=expected)
        answer = outcome_of("sync", results.sync_result)
        asked = Asked(pb.OPERATION_KIND_SYNC, request, start, answer)
        async for told in self._told(asked, context):
            yield pb.SyncResponse(**told)

    async def Verify(  # noqa: N802
        self, request: pb.VerifyRequest, context: Any
    ) -> AsyncIterator[pb.VerifyResponse]:
        """Streams progress, then what differs."""
        start = partial(self._jobs.verify, full=request.full, live=request.live)
        answer = outcome_of("verify", results.verify_result)
        asked = Asked(pb.OPERATION_KIND_VERIFY, request, start, answer)
        async for told in self._told(asked, context):
            yield pb.VerifyResponse(**told)

    async def Adopt(  # noqa: N802
        self, request: pb.AdoptRequest, context: Any
    ) -> AsyncIterator[pb.AdoptResponse]:
        """Streams progress, then the copy."""
        start = partial(
            self._jobs.adopt,
            await self._folders.allowed(_new_folder(request.directory), context),
        )
        answer = outcome_of("adopt", results.adopt_result)
        asked = Asked(pb.OPERATION_KIND_ADOPT, request, start, answer)
        async for told in self._told(asked, context):
            yield pb.AdoptResponse(**told)

    async def Export(  # noqa: N802
        self, request: pb.ExportRequest, context: Any
    ) -> AsyncIterator[pb.ExportResponse]:
        """Streams progress, then the result."""
        target = await self._folders.allowed(_new_folder(request.directory), context)
        expected = _expected(request)
        start = partial(self._jobs.export, target, expected_version=expected)
        answer = outcome_of("export", partial(results.export_result, str(target)))
        asked = Asked(pb.OPERATION_KIND_EXPORT, request, start, answer)
        async for told in self._told(asked, context):
            yield pb.ExportResponse(**told)

    async def CreateSnapshot(  # noqa: N802
        self, request: pb.CreateSnapshotRequest, context: Any
    ) -> AsyncIterator[pb.CreateSnapshotResponse]:
        """Streams progress, then the snapshot once it is durable."""
        name, expected = request.name, _expected(request)
        start = partial(self._jobs.snapshot, name, expected_version=expected)
        answer = outcome_of("snapshot", results.snapshot_message)
        asked = Asked(pb.OPERATION_KIND_CREATE_SNAPSHOT, request, start, answer)
        async for told in self._told(asked, context, "snapshot"):
            yield pb.CreateSnapshotResponse(**told)

    async def RestoreSnapshot(  # noqa: N802
        self, request: pb.RestoreSnapshotRequest, context: Any
    ) -> AsyncIterator[pb.RestoreSnapshotResponse]:
        """Streams progress, then the result."""
        start = partial(self._jobs.restore, request.snapshot_id, _expected(request))
        answer = outcome_of("restore", results.restore_result)
        asked = Asked(pb.OPERATION_KIND_RESTORE_SNAPSHOT, request, start, answer)
        async for told in self._told(asked, context):
            yield pb.RestoreSnapshotResponse(**told)

    async def Undo(  # noqa: N802
        self, request: pb.UndoRequest, context: Any
    ) -> AsyncIterator[pb.UndoResponse]:
        """Streams the result."""
        if request.updates < 0:
            raise InvalidArgument.at("updates", "must not be negative")
        start = partial(self._jobs.undo, request.updates or 1, _expected(request))
        answer = outcome_of("restore", results.restore_result)
        asked = Asked(pb.OPERATION_KIND_UNDO, request, start, answer)
        async for told in self._told(asked, context):
            yield pb.UndoResponse(**told)

    async def GetSnapshot(  # noqa: N802
        self, request: pb.GetSnapshotRequest, context: Any
    ) -> pb.GetSnapshotResponse:
        """One snapshot, by id or name."""
        session = self._owner.session()
        info = await _on_disk(lambda: find_snapshot(session, request.snapshot_id))
        return pb.GetSnapshotResponse(snapshot=results.snapshot_message(info))

    async def ListSnapshots(  # noqa: N802
        self, request: pb.ListSnapshotsRequest, context: Any
    ) -> pb.ListSnapshotsResponse:
        """A page of snapshots; its token is the id of its last one."""
        session, size = self._owner.session(), min(request.page_size or DEFAULT_SIZE, MAX_SIZE)
        if size < 0:
            raise InvalidArgument.at("page_size", "must not be negative")
        found = await _on_disk(lambda: session.checkpoints.store.list())
        newest = [i for i in reversed(found) if not request.page_token or i.id < request.page_token]
        page = newest[:size]
        return pb.ListSnapshotsResponse(
            snapshots=[results.snapshot_message(info) for info in page],
            next_page_token=page[-1].id if len(newest) > size else "",
        )

    async def DeleteSnapshot(  # noqa: N802
        self, request: pb.DeleteSnapshotRequest, context: Any
    ) -> pb.DeleteSnapshotResponse:
        """Deletes one snapshot, by id or name."""
        start = partial(self._jobs.delete, request.snapshot_id)
        asked = Asked(pb.OPERATION_KIND_DELETE_SNAPSHOT, request, start, lambda _: pb.Operation())
        operation = await self._operations.begin(asked)
        async for _ in operation.follow():
            pass
        if operation.error:
            raise operation.error
        return pb.DeleteSnapshotResponse()

    async def _told(
        self, asked: Asked, context: Any, result: str = "result"
    ) -> AsyncIterator[dict[str, Any]]:
        """The fields of each message of a stream: its operation's id, progress, and its outcome.

        The first has the id alone, where the operation has not ended.
        """
        with self._streams.one(context.peer()):
            operation = await self._operations.begin(asked)
            about, progress = {"operation_id": operation.row.operation_id}, None
            if not operation.row.ended:
                yield about
            async for _ in operation.follow():
                if operation.progress is not progress:
                    progress = operation.progress
                    yield about | {"progress": progress}
            if operation.error:
                raise operation.error
            ended = operation.message()
            yield about | {result: getattr(ended, str(ended.WhichOneof("outcome")))}


async def _on_disk(work: Callable[[], T]) -> T:
    """Off the event loop, with the disk's errors as domain errors."""
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise refused_by_disk(error) from error


def _expected(request: Any) -> int | None:
    has = request.HasField("expected_weight_version")
    return request.expected_weight_version if has else None


def _new_folder(directory: str) -> Path:
    path = Path(directory)
    if not directory or "\0" in directory or not path.is_absolute():
        raise InvalidArgument.at(
            "directory", "must be the absolute path of a folder that does not exist yet"
        )
    return path


def _asked_method(method: int) -> SyncMethod | None:
    asked: dict[int, SyncMethod | None] = {
        pb.SYNC_METHOD_UNSPECIFIED: None,
        pb.SYNC_METHOD_EXCHANGE: None,
        pb.SYNC_METHOD_ROLLFORWARD: SyncMethod.ROLLFORWARD,
        pb.SYNC_METHOD_IN_PLACE: SyncMethod.IN_PLACE,
    }
    if method not in asked:
        raise InvalidArgument.at(
            "method", "only EXCHANGE, ROLLFORWARD and IN_PLACE can be asked for"
        )
    return asked[method]
