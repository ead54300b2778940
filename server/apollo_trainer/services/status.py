"""StatusService: how the server is, now or as it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import status_pb2 as pb
from apollo_grpc.v1 import status_pb2_grpc as pb_grpc
from apollo_trainer.runs.events import now
from apollo_trainer.runs.status_board import StatusBoard
from apollo_trainer.services.streams import StreamLimit

HEARTBEAT_SECONDS = 15.0


class StatusService(pb_grpc.StatusServiceServicer):
    """Serves one status board."""

    def __init__(self, board: StatusBoard, streams: StreamLimit):
        self._board, self._streams = board, streams

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:  # noqa: N802
        """The status now."""
        return pb.GetStatusResponse(status=self._board.snapshot())

    async def WatchStatus(  # noqa: N802
        self, request: pb.WatchStatusRequest, context: Any
    ) -> AsyncIterator[pb.WatchStatusResponse]:
        """The status, then updates; a heartbeat when there is none for a while."""
        interval = request.min_interval.ToTimedelta().total_seconds()
        if interval < 0:
            raise InvalidArgument.at("min_interval", "must not be negative")
        with self._streams.one():
            subscriber = self._board.subscribe()
            try:
                async for update in _paced(subscriber, request.run_id, interval):
                    yield update
            finally:
                self._board.unsubscribe(subscriber)


async def _paced(subscriber: Any, run_id: str, interval: float) -> AsyncIterator[Any]:
    """Updates of one run or all; of several statuses within the interval only the last is sent."""
    loop = asyncio.get_running_loop()
    next_status_at, held, dropped = loop.time(), None, 0
    while True:
        wait = HEARTBEAT_SECONDS if held is None else max(0.0, next_status_at - loop.time())
        update = await subscriber.next(wait)
        if update is None and held is None:
            yield pb.WatchStatusResponse(heartbeat=pb.Heartbeat(time=now()))
            continue
        if update is not None:
            dropped += update.dropped
            if update.HasField("event"):
                if run_id in ("", update.event.run_id):
                    update.dropped, dropped = dropped, 0
                    yield update
                continue
            held = update
        if held is not None and loop.time() >= next_status_at:
            held.dropped, dropped = dropped, 0
            yield held
            held, next_status_at = None, loop.time() + interval
