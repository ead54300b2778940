"""CheckpointService: sync, snapshots, undo, restore and export of the one model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import checkpoint_pb2_grpc as pb_grpc
from apollo_trainer.checkpoints.directory import Progress, SyncMethod
from apollo_trainer.engine import ModelOwner
from apollo_trainer.operations import CheckpointJobs, find_snapshot, stopped
from apollo_trainer.services import checkpoint_results as results
from apollo_trainer.services.repeated import RepeatedCalls
from apollo_trainer.services.streams import StreamLimit

T = TypeVar("T")
MAX_PAGE, DEFAULT_PAGE = 1000, 50


class CheckpointService(pb_grpc.CheckpointServiceServicer):
    """Serves the one model of `owner`; what a call began is finished when its caller leaves.

    On its event loop: no thread waits for a job's end.
    """

    def __init__(self, owner: ModelOwner, jobs: CheckpointJobs, streams: StreamLimit):
        self._owner, self._jobs, self._streams = owner, jobs, streams
        self._repeated = RepeatedCalls()

    async def Sync(  # noqa: N802
        self, request: pb.SyncRequest, context: Any
    ) -> AsyncIterator[pb.SyncResponse]:
        """Streams progress, then the result."""
        method = _asked_method(request.method)
        start = partial(self._jobs.sync, method=method)
        async for update in self._told(request, context, start):
            yield _answer(pb.SyncResponse, update, results.sync_result)

    async def Verify(  # noqa: N802
        self, request: pb.VerifyRequest, context: Any
    ) -> AsyncIterator[pb.VerifyResponse]:
        """Streams progress, then what differs."""
        full, live = request.full, request.live
        directory = self._owner.session().attachment.directory
        start = partial(self._jobs.verify, full=full, live=live)
        async for update in self._told(request, context, start):
            yield _answer(pb.VerifyResponse, update, partial(results.verify_result, directory))

    async def Adopt(  # noqa: N802
        self, request: pb.AdoptRequest, context: Any
    ) -> AsyncIterator[pb.AdoptResponse]:
        """Streams progress, then the copy."""
        target = _new_folder(request.directory)
        async for update in self._told(request, context, partial(self._jobs.adopt, target)):
            yield _answer(pb.AdoptResponse, update, results.adopt_result)

    async def Export(  # noqa: N802
        self, request: pb.ExportRequest, context: Any
    ) -> AsyncIterator[pb.ExportResponse]:
        """Streams progress, then the result."""
        target = _new_folder(request.directory)
        async for update in self._told(request, context, partial(self._jobs.export, target)):
            yield _answer(pb.ExportResponse, update, partial(results.export_result, str(target)))

    async def CreateSnapshot(  # noqa: N802
        self, request: pb.CreateSnapshotRequest, context: Any
    ) -> AsyncIterator[pb.CreateSnapshotResponse]:
        """Streams progress, then the snapshot once it is durable."""
        name = request.name
        async for update in self._told(request, context, partial(self._jobs.snapshot, name)):
            yield _answer(pb.CreateSnapshotResponse, update, results.snapshot_message, "snapshot")

    async def RestoreSnapshot(  # noqa: N802
        self, request: pb.RestoreSnapshotRequest, context: Any
    ) -> AsyncIterator[pb.RestoreSnapshotResponse]:
        """Streams progress, then the result."""
        expected = _expected(request)
        start = partial(self._jobs.restore, request.snapshot_id, expected)
        async for update in self._told(request, context, start):
            yield _answer(pb.RestoreSnapshotResponse, update, results.restore_result)

    async def Undo(  # noqa: N802
        self, request: pb.UndoRequest, context: Any
    ) -> AsyncIterator[pb.UndoResponse]:
        """Streams the result."""
        if request.updates < 0:
            raise InvalidArgument.at("updates", "must not be negative")
        updates, expected = request.updates or 1, _expected(request)

        def start(progress: Progress) -> Future[Any]:
            return self._jobs.undo(updates, expected)

        async for update in self._told(request, context, start):
            yield pb.UndoResponse(result=results.restore_result(update))

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
        session, size = self._owner.session(), min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
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
        self._owner.session()
        start = partial(self._jobs.delete, request.snapshot_id)
        await _ended(self._repeated.begin(request, start))
        return pb.DeleteSnapshotResponse()

    async def CancelOperation(  # noqa: N802
        self, request: pb.CancelOperationRequest, context: Any
    ) -> pb.CancelOperationResponse:
        """Stops what the last call with an id began, where that can be."""
        job = self._repeated.last(request.request_id)
        return pb.CancelOperationResponse(state=results.cancel_state(job.cancel(), job.done()))

    async def _told(
        self, request: Any, context: Any, start: Callable[[Progress], Future[Any]]
    ) -> AsyncIterator[Any]:
        """Progress of a job of the training thread, then its result; the job never waits."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[pb.Operation.Progress | None]()

        def tell(done: int, total: int, current: str) -> None:
            progress = pb.Operation.Progress(bytes_done=done, bytes_total=total, current=current)
            _call(loop, lambda: news.put_nowait(progress))

        with self._streams.one(context.peer()):
            self._owner.session()
            future = self._repeated.begin(request, lambda: start(tell))
            future.add_done_callback(lambda _: _call(loop, lambda: news.put_nowait(None)))
            while (progress := await news.get()) is not None:
                yield progress
            yield _result(future)


def _answer(
    response: Callable[..., T], update: Any, read: Callable[[Any], Any], field: str = "result"
) -> T:
    """A message of a stream: progress as it is, or what the job came to in its own field."""
    if isinstance(update, pb.Operation.Progress):
        return response(progress=update)
    return response(**{field: read(update)})


def _call(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    # The server may have ended before the job did; nobody is left to be told then.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what)


async def _on_disk(work: Callable[[], T]) -> T:
    """Off the event loop, with the disk's errors as domain errors."""
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise _refused_by_disk(error) from error


async def _ended(future: Future[Any]) -> Any:
    """What a job comes to. No thread waits for it, and who leaves does not stop it."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    future.add_done_callback(lambda _: _call(loop, done.set))
    await done.wait()
    return _result(future)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except CancelledError:
        raise stopped() from None
    except OSError as error:
        raise _refused_by_disk(error) from error


def _refused_by_disk(error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"The disk refused ({error.strerror}). No weights are lost: the next sync, or start of "
        "the server, leaves the model directory wholly as before or wholly new. Make room or "
        "mend the permissions of the directory and its parent, then try again; `apollo checkpoint "
        "export FOLDER` writes what was learned to another disk.",
        reason="DIRECTORY_NOT_WRITABLE",
    )


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
