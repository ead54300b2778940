"""CheckpointService: the model directory brought up to date; the rest is not built yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from apollo_grpc.errors import FailedPrecondition, Unimplemented
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import checkpoint_pb2_grpc as pb_grpc
from apollo_trainer.runs.owner import ModelOwner
from apollo_trainer.services.streams import StreamLimit
from apollo_trainer.services.unbuilt import unbuilt


class CheckpointService(pb_grpc.CheckpointServiceServicer):
    """Serves the one model of `owner`."""

    def __init__(self, owner: ModelOwner, streams: StreamLimit):
        self._owner, self._streams = owner, streams

    async def Sync(  # noqa: N802
        self, request: pb.SyncRequest, context: Any
    ) -> AsyncIterator[pb.SyncResponse]:
        """Streams progress, then the result; the sync finishes when the caller leaves."""
        if request.request_id:
            raise Unimplemented(
                "request_id cannot be set in this version; nothing was done. Leave it empty.",
                metadata={"field": "request_id"},
            )
        loop, news = asyncio.get_running_loop(), asyncio.Queue[pb.Progress | None]()

        def tell(done: int, total: int, current: str) -> None:
            progress = pb.Progress(bytes_done=done, bytes_total=total, current=current)
            loop.call_soon_threadsafe(news.put_nowait, progress)

        with self._streams.one():
            self._owner.session()
            future = self._owner.sync(tell)
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(news.put_nowait, None))
            while (progress := await news.get()) is not None:
                yield pb.SyncResponse(progress=progress)
            yield pb.SyncResponse(result=_result(future))

    async def CreateSnapshot(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Not built yet."""
        unbuilt("CreateSnapshot")
        yield

    async def GetSnapshot(self, request: Any, context: Any) -> pb.GetSnapshotResponse:  # noqa: N802
        """Not built yet."""
        unbuilt("GetSnapshot")

    async def ListSnapshots(self, request: Any, context: Any) -> pb.ListSnapshotsResponse:  # noqa: N802
        """Not built yet."""
        unbuilt("ListSnapshots")

    async def DeleteSnapshot(self, request: Any, context: Any) -> pb.DeleteSnapshotResponse:  # noqa: N802
        """Not built yet."""
        unbuilt("DeleteSnapshot")

    async def RestoreSnapshot(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Not built yet."""
        unbuilt("RestoreSnapshot")
        yield

    async def Undo(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Not built yet."""
        unbuilt("Undo")
        yield

    async def Export(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Not built yet."""
        unbuilt("Export")
        yield


def _result(future: Any) -> pb.SyncResult:
    try:
        outcome, version = future.result()
    except OSError as error:
        raise FailedPrecondition(
            f"The model directory could not be written ({error.strerror}); its old files are kept. "
            "Make room or mend its permissions, then sync again.",
            reason="DIRECTORY_NOT_WRITABLE",
        ) from error
    return pb.SyncResult(
        bytes_compared=outcome.bytes_compared,
        bytes_written=outcome.bytes_written,
        tensors_changed=outcome.tensors_changed,
        weight_version=version,
        method=pb.SYNC_METHOD_RENAME if outcome.files_written else pb.SYNC_METHOD_UNCHANGED,
        files_written=outcome.files_written,
    )
