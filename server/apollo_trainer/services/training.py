"""TrainingService: checks a run, submits it, streams its events, finds it again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

from apollo_grpc.errors import FailedPrecondition, InvalidArgument, NotFound, Resource
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import ModelOwner
from apollo_trainer.ledger import PAGE, Deletion, RunRow, require_next, require_reached
from apollo_trainer.runs import RunQueue, Scoring
from apollo_trainer.services.in_context import ThreadsInContext
from apollo_trainer.services.paging import (
    DEFAULT_SIZE,
    MAX_SIZE,
    read_page_request,
    token_after,
)
from apollo_trainer.services.sample_calls import SampleCalls
from apollo_trainer.services.streams import StreamLimit

MAX_REQUEST_ID_BYTES = 256
SUBMITTING_THREADS = 2


class TrainingService(SampleCalls):
    """Serves the one model of `owner`, whose runs are those of `queue`; on its event loop.

    The queue reads the disk, so that it is asked from other threads. What takes longer, a run's
    end or the ledger's write, no thread waits for.
    """

    def __init__(
        self, owner: ModelOwner, queue: RunQueue, streams: StreamLimit, readers: StreamLimit
    ):
        self._owner, self._queue, self._scoring = owner, queue, Scoring(owner)
        self._streams, self._readers = streams, readers
        # Many samples take seconds to become token ids: calls that only look must not queue behind.
        self._submitting = ThreadsInContext(SUBMITTING_THREADS, "submit")

    async def Train(  # noqa: N802
        self, request: pb.TrainRequest, context: Any
    ) -> AsyncIterator[pb.TrainResponse]:
        """Submits a run and streams its events; the run goes on when the caller leaves."""
        with self._streams.one(context.peer()):
            accepted = self._accept(request)
            # The stream goes on for as long as the run does, and needs the samples no more.
            del request
            run_id = await accepted
            async for event in self._follow(run_id, 0):
                yield pb.TrainResponse(event=event)

    async def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunResponse:  # noqa: N802
        """Submits a run, and returns it once it is on disk."""
        row = await self._row(await self._accept(request))
        return pb.CreateRunResponse(run=row.to_run())

    async def _accept(self, request: pb.TrainRequest | pb.CreateRunRequest) -> str:
        """The id of the run that the request begins or began, which is on disk."""
        _check_request(request)
        loop = asyncio.get_running_loop()
        accepted = loop.run_in_executor(self._submitting, self._submit, request)
        del request
        return await asyncio.wrap_future(await accepted)

    def _submit(self, request: pb.TrainRequest | pb.CreateRunRequest) -> Future[str]:
        if found := self._queue.find(request.request_id, request.spec):
            return found
        run = self._checked(request.spec)
        return self._queue.submit(run, request.spec, request.request_id)

    async def WatchRun(  # noqa: N802
        self, request: pb.WatchRunRequest, context: Any
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """Streams the events of a run after a sequence, until it has finished."""
        _require_run_id(request.run_id)
        if request.after_sequence < 0:
            raise InvalidArgument.at("after_sequence", "must not be negative")
        with self._readers.one(context.peer()):
            async for event in self._follow(request.run_id, request.after_sequence):
                yield pb.WatchRunResponse(event=event)

    async def WatchRuns(  # type: ignore[override]  # noqa: N802
        self, request: pb.WatchRunsRequest, context: Any
    ) -> AsyncIterator[bytes]:
        """Streams the events of all runs after a revision, serialized."""
        after = request.after_revision if request.HasField("after_revision") else None
        if after is not None and after < 0:
            raise InvalidArgument.at("after_revision", "must not be negative")
        with self._readers.one(context.peer()):
            async for answer in self._queue.writer.feed.follow(after):
                yield answer

    async def _follow(self, run_id: str, after: int) -> AsyncIterator[pb.RunEvent]:
        if log := self._queue.log_of(run_id):
            async for event in log.follow(after):
                yield event
            return
        row = await self._row(run_id)
        require_reached(row.last_sequence, after)
        while after < row.last_sequence:
            page = await asyncio.to_thread(self._queue.ledger.events, run_id, after, PAGE)
            require_next(page, after)
            for event in page:
                after = event.sequence
                yield event

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:  # noqa: N802
        """One run; its samples where they are asked for, and as long as they are kept."""
        _require_run_id(request.run_id)
        if request.view not in pb.RunView.values():
            raise InvalidArgument.at("view", f"is {request.view}, which is no view")
        row, spec = await self._row(request.run_id), None
        if request.view == pb.RUN_VIEW_FULL:
            spec = await asyncio.to_thread(self._queue.ledger.spec, request.run_id)
        return pb.GetRunResponse(run=row.to_run(spec))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:  # noqa: N802
        """A page of runs."""
        page = read_page_request(request)
        rows = await asyncio.to_thread(
            self._queue.ledger.page, page.choice, page.size + 1, page.beyond
        )
        shown = rows[: page.size]
        token = token_after(shown[-1].number, page.choice) if len(rows) > page.size else ""
        return pb.ListRunsResponse(runs=[row.to_run() for row in shown], next_page_token=token)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:  # noqa: N802
        """Asks a run to stop; one that waits has ended when this returns."""
        _require_run_id(request.run_id)
        log = await asyncio.to_thread(self._queue.cancel, request.run_id)
        ended = [event async for event in log.follow(log.sequence - 1)] if log else []
        run = (await self._row(request.run_id)).to_run()
        for event in ended:
            # The ledger may not have it yet: a full disk.
            run.state, run.last_sequence = event.finished.state, event.sequence
        return pb.CancelRunResponse(run=run)

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Any) -> pb.DeleteRunResponse:  # noqa: N802
        """Deletes a run that has ended; nothing of it is on the disk when this returns."""
        _require_run_id(request.run_id)
        _require_ended(await self._row(request.run_id))
        await asyncio.wrap_future(self._queue.writer.change(Deletion(request.run_id)))
        return pb.DeleteRunResponse()

    async def ListRegressionProbes(  # noqa: N802
        self, request: pb.ListRegressionProbesRequest, context: Any
    ) -> pb.ListRegressionProbesResponse:
        """A page of the regression set; its token is the name of its last probe."""
        if request.page_size < 0:
            raise InvalidArgument.at("page_size", "must not be negative")
        found = await asyncio.to_thread(self._queue.regression_set().probes)
        later = [probe for probe in found if probe.name > request.page_token]
        page = later[: min(request.page_size or DEFAULT_SIZE, MAX_SIZE)]
        token = page[-1].name if len(page) < len(later) else ""
        return pb.ListRegressionProbesResponse(probes=page, next_page_token=token)

    async def DeleteRegressionProbes(  # noqa: N802
        self, request: pb.DeleteRegressionProbesRequest, context: Any
    ) -> pb.DeleteRegressionProbesResponse:
        """Takes probes out of the regression set, or all of them without names."""
        found = self._queue.regression_set()
        deleted = await asyncio.to_thread(found.remove, set(request.names))
        return pb.DeleteRegressionProbesResponse(deleted=deleted)

    async def _row(self, run_id: str) -> RunRow:
        row = await asyncio.to_thread(self._queue.ledger.run, run_id)
        if row is None:
            raise NotFound(
                "There is no such run. 'apollo runs' lists those that are kept.",
                reason="RUN_NOT_FOUND",
                resource=Resource("run", run_id),
            )
        return row


def _check_request(request: pb.TrainRequest | pb.CreateRunRequest) -> None:
    if not request.HasField("spec"):
        raise InvalidArgument.at("spec", "is required")
    if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidArgument.at("request_id", f"is longer than {MAX_REQUEST_ID_BYTES} bytes")


def _require_ended(row: RunRow) -> None:
    if not row.has_ended:
        raise FailedPrecondition(
            f"Run {row.run_id} has not ended; nothing was deleted. Cancel it, or wait for its end, "
            "then delete it.",
            reason="RUN_NOT_ENDED",
            resource=Resource("run", row.run_id),
        )


def _require_run_id(run_id: str) -> None:
    if not run_id:
        raise InvalidArgument.at("run_id", "is required")
