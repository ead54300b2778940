"""A training server as a process of its own, attached to an engine without vLLM, for all tests."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient, AsyncApolloClient
from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import status_pb2
from tests import programs
from tests.waiting import HANG, wait_until


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[str]:
    """The address of a training server with an engine."""
    from tests.engine_double import EngineDouble

    with tempfile.TemporaryDirectory(prefix="apollo-") as folder:
        # It keeps what it syncs for as long as it lives.
        model = Path(shutil.copytree(tiny_model, Path(folder, "model")))
        engine = EngineDouble(model, f"unix:{folder}/sidecar.sock")
        environment = os.environ | {"APOLLO_STATE_DIR": folder, "OMP_NUM_THREADS": "1"}
        log = Path(folder, "server.log")
        process = programs.start(programs.SERVER, "--rank", "8", env=environment, log=log)
        address = f"unix:{folder}/training.sock"
        wait_until(lambda: attached(address), "the attachment")
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 0
        engine.stop()


def attached(address: str) -> bool:
    with ApolloClient(address) as client:
        try:
            return client.status().attachment == status_pb2.ATTACHMENT_STATE_ATTACHED
        except Unavailable:
            return False


class Blocking:
    """`ApolloClient`, as the tests of both clients call it."""

    def __init__(self, address: str, **options: Any):
        self.client = ApolloClient(address, **options)

    def train(self, *arguments: Any, **options: Any) -> list[Any]:
        return list(self.client.train(*arguments, **options))

    def read(self, count: int, name: str, *arguments: Any, **options: Any) -> Any:
        """The id of a call's run, so many of its events, and then its result."""
        run = getattr(self.client, name)(*arguments, **options)
        return run.run_id, [next(run) for _ in range(count)], run.result()

    def left(self, told: str, *arguments: Any) -> Any:
        """What is heard of a run's id or result once its stream was left."""
        with self.client.train(*arguments) as run:
            pass
        return run.run_id if told == "run_id" else run.result()

    def follow(self, *arguments: Any) -> list[Any]:
        """Every event of a run, by `watch_run`."""
        return list(self.client.watch_run(*arguments))

    def follow_all(self, after: int | None, act: Callable[[], int]) -> list[Any]:
        """The first message of all runs' events, and as many more as `act` then says."""
        with self.client.watch_runs(after) as stream:
            told = [next(stream)]
            return told + [next(stream) for _ in range(act())]

    def begin(self, *arguments: Any, **options: Any) -> Any:
        """Starts a run, reads until its first step, and leaves; returns that step."""
        with self.client.train(*arguments, **options) as stream:
            return next(event.step for event in stream if event.HasField("step"))

    def after_leaving(self) -> list[Any]:
        """What is still read from a stream after it was left."""
        with self.client.watch() as stream:
            next(stream)
        return list(stream)

    def after_closing(self) -> list[Any]:
        """What is still read from streams after their client was closed, once it is."""
        watched, followed = self.client.watch(), self.client.train([("a", "b")], epochs=10)
        next(watched), next(followed)
        self.client.close()
        return [*watched, *followed]

    def watch_until(self, found: Callable[[Any], bool], act: Callable[[], Any]) -> list[Any]:
        """Updates from the first, after which `act` is called, to the one that is looked for."""
        with self.client.watch() as stream:
            updates = [next(stream)]
            act()
            while not found(updates[-1]):
                updates.append(next(stream))
        return updates

    def call(self, name: str, /, *arguments: Any, **options: Any) -> Any:
        return getattr(self.client, name)(*arguments, **options)

    def close(self) -> None:
        self.client.close()


class Asyncio:
    """`AsyncApolloClient` behind the same calls, on an event loop of its own."""

    def __init__(self, address: str, **options: Any):
        self._runner = asyncio.Runner()

        async def connect() -> AsyncApolloClient:
            return AsyncApolloClient(address, **options)

        self.client = self._runner.run(connect())

    def train(self, *arguments: Any, **options: Any) -> list[Any]:
        async def collect() -> list[Any]:
            return [event async for event in self.client.train(*arguments, **options)]

        return self._runner.run(collect())

    def read(self, count: int, name: str, *arguments: Any, **options: Any) -> Any:
        async def collect() -> Any:
            run = getattr(self.client, name)(*arguments, **options)
            return await run.run_id, [await anext(run) for _ in range(count)], await run.result()

        return self._runner.run(collect())

    def left(self, told: str, *arguments: Any) -> Any:
        async def leave() -> Any:
            async with self.client.train(*arguments) as run:
                pass
            return await (run.run_id if told == "run_id" else run.result())

        return self._runner.run(leave())

    def follow(self, *arguments: Any) -> list[Any]:
        async def collect() -> list[Any]:
            return [event async for event in self.client.watch_run(*arguments)]

        return self._runner.run(collect())

    def follow_all(self, after: int | None, act: Callable[[], int]) -> list[Any]:
        async def collect() -> list[Any]:
            async with self.client.watch_runs(after) as stream:
                told = [await anext(stream)]
                count = await asyncio.to_thread(act)
                return told + [await anext(stream) for _ in range(count)]

        return self._runner.run(collect())

    def begin(self, *arguments: Any, **options: Any) -> Any:
        async def first() -> Any:
            async with self.client.train(*arguments, **options) as stream:
                while not (event := await anext(stream)).HasField("step"):
                    pass
                return event.step

        return self._runner.run(first())

    def after_leaving(self) -> list[Any]:
        async def leave() -> list[Any]:
            async with self.client.watch() as stream:
                await anext(stream)
            return [update async for update in stream]

        return self._runner.run(leave())

    def after_closing(self) -> list[Any]:
        async def close() -> list[Any]:
            watched, followed = self.client.watch(), self.client.train([("a", "b")], epochs=10)
            await anext(watched)
            await anext(followed)
            await self.client.close()
            return [event for stream in (watched, followed) async for event in stream]

        return self._runner.run(close())

    def watch_until(self, found: Callable[[Any], bool], act: Callable[[], Any]) -> list[Any]:
        async def collect() -> list[Any]:
            async with self.client.watch() as stream:
                updates = [await anext(stream)]
                await asyncio.to_thread(act)
                while not found(updates[-1]):
                    updates.append(await anext(stream))
            return updates

        return self._runner.run(collect())

    def call(self, name: str, /, *arguments: Any, **options: Any) -> Any:
        async def call() -> Any:
            called = getattr(self.client, name)(*arguments, **options)
            return await called if inspect.isawaitable(called) else called

        return self._runner.run(call())

    def close(self) -> None:
        self.call("close")
        self._runner.close()


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes a client of either kind; all are closed at the end."""
    made: list[Any] = []

    def make(address: str, **options: Any) -> Any:
        made.append(request.param(address, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()
