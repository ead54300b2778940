"""CheckpointService: the model directory brought up to date; the rest is not built yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from apollo_grpc.errors import FailedPrecondition, InvalidArgument, Unimplemented
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import checkpoint_pb2_grpc as pb_grpc
from apollo_trainer.checkpoints.sync import Progress, SyncMethod, SyncOutcome
from apollo_trainer.checkpoints.verify import Verification
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
        _refuse_request_id(request.request_id)
        method = _asked_method(request.method)
        async for update in self._told(lambda tell: self._owner.sync(tell, method)):
            if isinstance(update, pb.Progress):
                yield pb.SyncResponse(progress=update)
            else:
                yield pb.SyncResponse(result=_sync_result(update))

    async def Verify(  # noqa: N802
        self, request: pb.VerifyRequest, context: Any
    ) -> AsyncIterator[pb.VerifyResponse]:
        """Streams progress, then what differs."""
        full, live, directory = request.full, request.live, self._directory()
        async for update in self._told(lambda t: self._owner.verify(t, full=full, live=live)):
            if isinstance(update, pb.Progress):
                yield pb.VerifyResponse(progress=update)
            else:
                yield pb.VerifyResponse(result=_verify_result(directory, update))

    async def Adopt(  # noqa: N802
        self, request: pb.AdoptRequest, context: Any
    ) -> AsyncIterator[pb.AdoptResponse]:
        """Streams progress, then the copy; it is finished when the caller leaves."""
        _refuse_request_id(request.request_id)
        if not request.directory:
            raise InvalidArgument.at("directory", "must name a folder that does not exist yet")
        target = Path(request.directory)
        async for update in self._told(lambda tell: self._owner.adopt(target, tell)):
            if isinstance(update, pb.Progress):
                yield pb.AdoptResponse(progress=update)
            else:
                yield pb.AdoptResponse(
                    result=pb.AdoptResult(
                        directory=str(update.directory),
                        files=update.files,
                        bytes_written=update.bytes_written,
                    )
                )

    def _directory(self) -> str:
        return self._owner.session().attachment.directory

    async def _told(self, start: Callable[[Progress], Future[Any]]) -> AsyncIterator[Any]:
        """Progress of a job of the training thread, then its result; the job never waits."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[pb.Progress | None]()

        def tell(done: int, total: int, current: str) -> None:
            progress = pb.Progress(bytes_done=done, bytes_total=total, current=current)
            loop.call_soon_threadsafe(news.put_nowait, progress)

        with self._streams.one():
            self._owner.session()
            future = start(tell)
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(news.put_nowait, None))
            while (progress := await news.get()) is not None:
                yield progress
            yield _result(future)

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


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except OSError as error:
        raise FailedPrecondition(
            f"The disk refused ({error.strerror}); the model directory keeps whole weights, those "
            "of before. Make room or mend the permissions of the directory and its parent, then "
            "try again.",
            reason="DIRECTORY_NOT_WRITABLE",
        ) from error


def _refuse_request_id(request_id: str) -> None:
    if request_id:
        raise Unimplemented(
            "request_id cannot be set in this version; nothing was done. Leave it empty.",
            metadata={"field": "request_id"},
        )


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


def _verify_result(directory: str, found: Verification) -> pb.VerifyResult:
    return pb.VerifyResult(
        directory=directory,
        generation=found.generation,
        tensors=found.tensors,
        bytes_read=found.bytes_read,
        differences=[pb.Difference(**vars(difference)) for difference in found.differences],
    )


def _sync_result(done: tuple[SyncOutcome, int]) -> pb.SyncResult:
    outcome, version = done
    return pb.SyncResult(
        bytes_compared=outcome.bytes_compared,
        bytes_written=outcome.bytes_written,
        tensors_changed=outcome.tensors_changed,
        weight_version=version,
        method=pb.SyncMethod.Value(f"SYNC_METHOD_{outcome.method.name}"),
        files_written=outcome.files_written,
    )
