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
    """Updates of one run or all; of several statuses within the interval only the last is sent.

    A heartbeat follows whenever nothing was sent for a while, also while updates are held back.
    """
    loop = asyncio.get_running_loop()
    next_status_at = sent_at = loop.time()
    held, dropped = None, 0
    while not subscriber.ended:
        beat_at = sent_at + HEARTBEAT_SECONDS
        due = beat_at if held is None else min(beat_at, next_status_at)
        update = await subscriber.next(max(0.0, due - loop.time()))
        answer = None
        if update is not None:
            dropped += update.dropped
            if not update.HasField("event"):
                held = update
            elif run_id in ("", update.event.run_id):
                answer = update
        if answer is None and held is not None and loop.time() >= next_status_at:
            answer, held, next_status_at = held, None, loop.time() + interval
        if answer is None and loop.time() >= beat_at:
            answer = pb.WatchStatusResponse(heartbeat=pb.Heartbeat(time=now()))
        if answer is not None:
            answer.dropped, dropped = dropped, 0
            yield answer
            sent_at = loop.time()
