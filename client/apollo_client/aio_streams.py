"""Streams of the asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc.aio

from apollo_client.connection import readable
from apollo_client.lifetime import Lifetime, is_cancelled
from apollo_client.resume import Patience, Resume, RunsResume
from apollo_client.run_result import RunRecord, RunResult, left
from apollo_grpc.errors import ApolloError
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import training_pb2

T = TypeVar("T")
Begin = Callable[[Any, Any], Any]


class AsyncStream(Generic[T]):
    """Messages of one call, as they arrive. Raises the `ApolloError` that ended it, if one did.

    A call that the server refused for now, before its first message, is made again.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        patience: Patience,
        endpoint: Endpoint,
        lifetime: Lifetime,
        read: Callable[[Any], T],
    ):
        self._open, self._patience = call, patience
        self._endpoint, self._lifetime, self._read = endpoint, lifetime, read
        self._left = False
        self._call = call()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            self._lifetime.require_here()
            try:
                message = await self._call.read()
            except asyncio.CancelledError:
                # Also raised for a call that was left, which would pass for this task's own end.
                if self._has_left() and not is_cancelled():
                    raise StopAsyncIteration from None
                raise
            except grpc.RpcError as raised:
                if self._lifetime.closed:
                    raise StopAsyncIteration from None
                error = readable(raised, self._endpoint)
            else:
                if message is grpc.aio.EOF:
                    raise StopAsyncIteration
                self._patience.heard()
                return self._read(message)
            await self._again(error)

    async def _again(self, error: ApolloError | None) -> None:
        """Makes the call again, in a while; raises where that makes no sense."""
        if not self._has_left():
            await asyncio.sleep(self._patience.wait_after(error))
        if self._has_left():
            raise StopAsyncIteration
        self._call = self._open()

    def _has_left(self) -> bool:
        return self._left or self._lifetime.closed

    def close(self) -> None:
        """Leaves the stream: iterating it ends. What it watched goes on."""
        self._left = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncResumedStream(AsyncStream[T]):
    """Messages that go on where they broke off, none lost and none twice, over restarts."""

    def __init__(
        self,
        begin: Begin,
        stub: Any,
        resume: Resume | RunsResume,
        endpoint: Endpoint,
        lifetime: Lifetime,
        read: Callable[[Any], T],
    ):
        self._resume: Any = resume
        super().__init__(partial(resume.call, begin, stub), resume, endpoint, lifetime, read)

    async def __anext__(self) -> T:
        while not self._resume.ended:
            try:
                message = await super().__anext__()
            except StopAsyncIteration:
                await self._again(None)
                continue
            if self._resume.take(message):
                return message
        raise StopAsyncIteration


class AsyncRunStream(AsyncResumedStream[training_pb2.RunEvent]):
    """The events of one run, none lost and none twice, also when the server is restarted."""

    def __init__(
        self, begin: Begin, stub: Any, resume: Resume, endpoint: Endpoint, lifetime: Lifetime
    ):
        super().__init__(begin, stub, resume, endpoint, lifetime, lambda response: response.event)
        self._record, self._ahead = RunRecord(), list[training_pb2.RunEvent]()

    async def __anext__(self) -> training_pb2.RunEvent:
        if self._ahead and not self._has_left():
            return self._ahead.pop()
        event = await super().__anext__()
        self._record.take(event)
        return event

    @property
    def run_id(self) -> Coroutine[Any, Any, str]:
        """As `RunStream.run_id`, to be awaited: `await run.run_id`."""
        return self._known_id()

    async def _known_id(self) -> str:
        if not self._resume.run_id:
            with suppress(StopAsyncIteration):
                self._ahead.append(await anext(self))
        if not self._resume.run_id:
            raise left("id")
        return str(self._resume.run_id)

    async def result(self) -> RunResult:
        """What the run came to, once it has ended; reads the events that are left.

        Raises as iterating does, and FailedPrecondition where the stream was left. A run that
        failed raises nothing: `raise_for_failure` of the result does.
        """
        async for _ in self:
            pass
        return self._record.result()


class AsyncRunsStream(AsyncResumedStream[training_pb2.WatchRunsResponse]):
    """The events of all runs with their revisions, none lost and none twice, over restarts."""

    def __init__(
        self, begin: Begin, stub: Any, resume: RunsResume, endpoint: Endpoint, lifetime: Lifetime
    ):
        super().__init__(begin, stub, resume, endpoint, lifetime, lambda response: response)
