"""TrainingService: checks a run, submits it, streams its events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from apollo_grpc.errors import InvalidArgument, Unimplemented
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1 import training_pb2_grpc as pb_grpc
from apollo_trainer.runs.owner import ModelOwner
from apollo_trainer.runs.run import prepare_run
from apollo_trainer.services.streams import StreamLimit
from apollo_trainer.services.unbuilt import unbuilt


class TrainingService(pb_grpc.TrainingServiceServicer):
    """Serves the one model of `owner`."""

    def __init__(self, owner: ModelOwner, streams: StreamLimit):
        self._owner, self._streams = owner, streams

    async def Train(  # noqa: N802
        self, request: pb.TrainRequest, context: Any
    ) -> AsyncIterator[pb.TrainResponse]:
        """Submits a run and streams its events; the run goes on when the caller leaves."""
        if not request.HasField("spec"):
            raise InvalidArgument.at("spec", "is required")
        if request.request_id:
            raise Unimplemented(
                "request_id cannot be set in this version; nothing was done. Leave it empty.",
                metadata={"field": "request_id"},
            )
        with self._streams.one():
            session = self._owner.session()
            # Tokenizing many samples would hold up every other call of the event loop.
            run = await asyncio.to_thread(
                prepare_run, request.spec, session.limits, session.tokenizer
            )
            async for event in self._owner.submit(run).follow():
                yield pb.TrainResponse(event=event)

    async def WatchRun(  # noqa: N802
        self, request: pb.WatchRunRequest, context: Any
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """Not built yet."""
        unbuilt("WatchRun")
        yield

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:  # noqa: N802
        """Not built yet."""
        unbuilt("GetRun")

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:  # noqa: N802
        """Not built yet."""
        unbuilt("ListRuns")

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:  # noqa: N802
        """Not built yet."""
        unbuilt("CancelRun")
