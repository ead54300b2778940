"""StatusService: how the server is, now or as it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.times import now
from apollo_grpc.v1 import status_pb2 as pb
from apollo_grpc.v1 import status_pb2_grpc as pb_grpc
from apollo_trainer.engine import ServerInfo, StatusBoard
from apollo_trainer.services.streams import StreamLimit
from apollo_trainer.watching import Ring, Watcher

HEARTBEAT_SECONDS = 15.0


class StatusService(pb_grpc.StatusServiceServicer):
    """Serves one status board, and its news as a ring holds them."""

    def __init__(self, board: StatusBoard, ring: Ring, streams: StreamLimit, info: ServerInfo):
        self._board, self._ring, self._streams, self._info = board, ring, streams, info

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:  # noqa: N802
        """The status now."""
        return pb.GetStatusResponse(status=self._board.snapshot())

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Any
    ) -> pb.GetServerInfoResponse:
        """What this server and the attached model can do, and what they limit."""
        return await asyncio.to_thread(self._info.now)

    async def WatchStatus(  # type: ignore[override]  # noqa: N802
        self, request: pb.WatchStatusRequest, context: Any
    ) -> AsyncIterator[bytes]:
        """The status, then updates, serialized; a heartbeat when there is none for a while."""
        interval = request.min_interval.seconds + request.min_interval.nanos / 1e9
        if interval < 0:
            raise InvalidArgument.at("min_interval", "must not be negative")
        with self._streams.one(context.peer()):
            watcher = self._ring.subscribe()
            try:
                async for answer in _paced(watcher, request.run_id, interval):
                    yield answer
            finally:
                self._ring.unsubscribe()


async def _paced(watcher: Watcher, run_id: str, interval: float) -> AsyncIterator[bytes]:
    """Updates of one run or all; of several statuses within the interval only the last is sent.

    A heartbeat follows whenever nothing was sent for a while, also while updates are held back.
    """
    loop = asyncio.get_running_loop()
    next_status_at = sent_at = loop.time()
    held: bytes | None = None
    while not watcher.ended:
        update, answer, time = watcher.take(), None, loop.time()
        beat_at = sent_at + HEARTBEAT_SECONDS
        if update and update.run_id is None:
            held = update.data
        elif update and run_id in ("", update.run_id):
            answer = update.data
        if answer is None and held is not None and time >= next_status_at:
            answer, held, next_status_at = held, None, time + interval
        if answer is None and time >= beat_at:
            answer = _heartbeat()
        if answer is not None:
            yield _with_lost(answer, watcher)
            sent_at = loop.time()
        elif update is None:
            due = beat_at if held is None else min(beat_at, next_status_at)
            await watcher.wait(due - time)


def _heartbeat() -> bytes:
    return pb.WatchStatusResponse(heartbeat=pb.Heartbeat(time=now())).SerializeToString()


def _with_lost(answer: bytes, watcher: Watcher) -> bytes:
    """Serialized messages, one after the other, are one message."""
    lost, watcher.lost = watcher.lost, 0
    return answer + pb.WatchStatusResponse(dropped=lost).SerializeToString() if lost else answer
