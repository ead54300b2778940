"""The events of all runs over a real channel: how they begin, end, are limited, what they cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import InvalidArgument, OutOfRange, ResourceExhausted, Unavailable
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import training_pb2 as pb
from tests.books import Books, finish
from tests.engine_double import EngineDouble
from tests.server_process import ServerProcess
from tests.waiting import HANG, wait_until

WATCHERS, CHANNELS = 66, 6
# Ended runs' events: what all who never read would hold together, where each held all of it.
EVENTS, LOSSES = 400, 2500
MAX_GROWTH_KIB = 64 * 1024


def test_a_watcher_from_now_on_is_told_where_it_begins_and_then_every_run(caller: Any) -> None:
    before = caller.train()
    watched = caller.watch_runs()
    first = next(watched)
    assert not first.HasField("event")
    trained = [caller.train(epochs=2), caller.train(epochs=3)]
    told = [next(watched) for _ in range(sum(map(len, trained)))]
    assert [each.event for each in told] == [event for run in trained for event in run]
    assert [each.revision for each in told] == sorted(each.revision for each in told)
    assert told[0].revision > first.revision
    everything = caller.watch_runs(0)
    assert [next(everything).event for _ in before] == before
    for stream in (watched, everything):
        stream.cancel()


def test_a_revision_that_is_none_is_refused(caller: Any, error_of: Any) -> None:
    watched = caller.watch_runs()
    newest = next(watched).revision
    watched.cancel()
    assert isinstance(error_of(caller.watch_runs(-1)), InvalidArgument)
    error = error_of(caller.watch_runs(newest + 1))
    assert isinstance(error, OutOfRange)
    assert error.metadata == {"newest_revision": str(newest)}


def test_watchers_are_readers_of_whom_there_are_so_many(start_server: Any, error_of: Any) -> None:
    caller = start_server(max_streams=1)
    watched = caller.watch_runs()
    next(watched)
    error = error_of(caller.watch_runs())
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "TOO_MANY_STREAMS"
    watched.cancel()


def test_a_watcher_is_told_that_the_server_stops(start_server: Any, error_of: Any) -> None:
    caller = start_server()
    watched = caller.watch_runs()
    next(watched)
    threading.Timer(0.1, caller.terminate).start()
    error = error_of(watched)
    assert isinstance(error, Unavailable)
    assert error.reason == "SERVER_STOPPING"


# --- many watchers ------------------------------------------------------------------------------


@pytest.fixture
def server(tiny_model: Path, state_dir: Path) -> Iterator[ServerProcess]:
    """An attached server process whose ledger has megabytes of events."""
    books = Books(state_dir)
    log = books.accept("earlier")
    for _ in range(EVENTS):
        log.append(evaluated=pb.RunEvent.Evaluated(losses=[1.0] * LOSSES))
    finish(log)
    wait_until(lambda: log.kept_on_disk, "the ledger")
    books.close()
    engine = EngineDouble(tiny_model, f"unix:{state_dir}/sidecar.sock")
    server = ServerProcess(state_dir)
    server.start()
    try:
        server.wait_attached()
        yield server
    finally:
        server.end()
        engine.stop()


def train(address: str) -> int:
    """Trains; returns how many events that came to."""
    with ApolloClient(address) as client:
        return len(list(client.train([("The sea is", " deep.")], epochs=50, min_loss=0)))


class Watchers:
    """Of all runs from the first event; every third one reads a message and no more."""

    def __init__(self, address: str):
        channels = [Endpoint(address).aio_channel() for _ in range(CHANNELS)]
        request = pb.WatchRunsRequest(after_revision=0).SerializeToString()
        self._channels, self._calls = (
            channels,
            [
                channels[n % CHANNELS].unary_stream("/apollo.v1.TrainingService/WatchRuns")(request)
                for n in range(WATCHERS)
            ],
        )
        self.read = [0] * WATCHERS

    async def begin(self) -> None:
        for call in self._calls:
            await call.read()
        self._reading = asyncio.gather(*map(self._read_on, range(WATCHERS)))

    async def _read_on(self, number: int) -> None:
        while number % 3 and await self._calls[number].read() is not grpc.aio.EOF:
            self.read[number] += 1

    async def have_read(self, count: int) -> None:
        """Until all who read have read so many more than the first."""
        async with asyncio.timeout(HANG):
            while min(read for n, read in enumerate(self.read) if n % 3) < count:
                await asyncio.sleep(0.01)
        assert max(self.read) == count

    async def leave(self) -> None:
        for call in self._calls:
            call.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        for channel in self._channels:
            await channel.close()


def test_66_watchers_a_third_of_whom_never_read_cost_bounded_memory(server: ServerProcess) -> None:
    # What a first run takes is no watcher's.
    earlier = train(server.address)
    before, growth = server.memory_kib(), list[int]()

    async def watch() -> None:
        watchers = Watchers(server.address)
        await watchers.begin()
        # All but the first: `queued`, the events, `finished`.
        await watchers.have_read(EVENTS + 1 + earlier)
        growth.append(server.memory_kib() - before)
        trained = await asyncio.to_thread(train, server.address)
        await watchers.have_read(EVENTS + 1 + earlier + trained)
        growth.append(server.memory_kib() - before)
        await watchers.leave()

    asyncio.run(watch())
    print(f"the server's memory grew by {growth} KiB")
    assert max(growth) < MAX_GROWTH_KIB
