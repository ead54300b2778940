"""The asyncio client: the same calls as the blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc.aio

from apollo_client.aio_checkpoint_calls import AsyncCheckpointCalls
from apollo_client.connection import (
    RETRY_SECONDS,
    STATUS_SECONDS,
    Told,
    find_server,
    message,
    readable,
)
from apollo_client.lifetime import Lifetime, is_cancelled, running_loop
from apollo_client.placing import Place
from apollo_client.requests import (
    RunOptions,
    list_request,
    placed_spec,
    train_request,
    watch_request,
)
from apollo_client.resume import Patience, Resume
from apollo_client.samples import SampleLike
from apollo_grpc.errors import ApolloError
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import status_pb2, training_pb2
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub

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


class AsyncRunStream(AsyncStream[training_pb2.RunEvent]):
    """The events of one run, none lost and none twice, also when the server is restarted."""

    def __init__(
        self, begin: Begin, stub: Any, resume: Resume, endpoint: Endpoint, lifetime: Lifetime
    ):
        self._resume = resume

        def call() -> Any:
            request = resume.request()
            known = isinstance(request, training_pb2.WatchRunRequest)
            return begin(stub.WatchRun if known else stub.Train, request)

        super().__init__(call, resume, endpoint, lifetime, lambda response: response.event)

    async def __anext__(self) -> training_pb2.RunEvent:
        while not self._resume.ended:
            try:
                event = await super().__anext__()
            except StopAsyncIteration:
                await self._again(None)
                continue
            if self._resume.take(event):
                return event
        raise StopAsyncIteration


class AsyncApolloClient(AsyncCheckpointCalls):
    """`ApolloClient` for asyncio; made and used on one event loop.

    Takes the same arguments and raises the same errors; FailedPrecondition elsewhere.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ):
        self._lifetime = Lifetime(running_loop())
        self._endpoint = find_server(address, token, ca, certificate, key)
        self._metadata, self._retry_seconds = self._endpoint.metadata(), retry_seconds
        self._channel = self._endpoint.aio_channel()
        # The stubs' types name the blocking channel; at run time they take either.
        channel: Any = self._channel
        self._training: Any = TrainingServiceStub(channel)
        self._checkpoints: Any = CheckpointServiceStub(channel)
        self._status: Any = StatusServiceStub(channel)

    def train(
        self,
        samples: Iterable[SampleLike],
        *,
        request_id: str | None = None,
        **options: Unpack[RunOptions],
    ) -> AsyncRunStream:
        """Starts a run and returns its events; see `ApolloClient.train`."""
        spec, places = placed_spec(samples, options)
        return self._follow(train_request(spec, request_id, places), places)

    def train_spec(
        self, spec: training_pb2.RunSpec, *, request_id: str | None = None
    ) -> AsyncRunStream:
        """The same for a spec that the caller built."""
        return self._follow(train_request(spec, request_id))

    def watch_run(self, run_id: str, after_sequence: int = 0) -> AsyncRunStream:
        """The events of a run; see `ApolloClient.watch_run`."""
        request = message(
            training_pb2.WatchRunRequest, run_id=run_id, after_sequence=after_sequence
        )
        return self._follow(request)

    def _follow(
        self,
        request: training_pb2.TrainRequest | training_pb2.WatchRunRequest,
        places: Sequence[Place] = (),
    ) -> AsyncRunStream:
        resume = Resume(request, self._retry_seconds, places)
        return AsyncRunStream(self._begin, self._training, resume, self._endpoint, self._lifetime)

    async def get_run(self, run_id: str) -> training_pb2.Run:
        """One run with its spec; see `ApolloClient.get_run`."""
        request = message(training_pb2.GetRunRequest, run_id=run_id)
        run: training_pb2.Run = (await self._answer(self._training.GetRun, request)).run
        return run

    async def list_runs(
        self, page_size: int = 0, page_token: str = "", states: Iterable[str | int] = ()
    ) -> training_pb2.ListRunsResponse:
        """A page of runs, newest first; see `ApolloClient.list_runs`."""
        request = list_request(page_size, page_token, states)
        page: training_pb2.ListRunsResponse = await self._answer(self._training.ListRuns, request)
        return page

    async def cancel_run(self, run_id: str) -> training_pb2.Run:
        """Asks a run to stop; see `ApolloClient.cancel_run`."""
        request = message(training_pb2.CancelRunRequest, run_id=run_id)
        run: training_pb2.Run = (await self._answer(self._training.CancelRun, request)).run
        return run

    async def status(self) -> status_pb2.ServerStatus:
        """How the server is now."""
        request = status_pb2.GetStatusRequest()
        status: status_pb2.ServerStatus = (
            await self._answer(self._status.GetStatus, request)
        ).status
        return status

    def watch(
        self, run_id: str = "", min_interval: float = 0.0
    ) -> AsyncStream[status_pb2.WatchStatusResponse]:
        """The status first, then what happens; see `ApolloClient.watch`."""
        request = watch_request(run_id, min_interval)
        return self._stream(self._status.WatchStatus, request, lambda response: response)

    async def _result(self, method: Any, request: Any, progress: Told | None) -> Any:
        """The last message's result of a stream that tells its progress before."""
        result = None
        stream: AsyncStream[Any] = self._stream(method, request, lambda response: response)
        async for response in stream:
            kind = response.WhichOneof("update")
            if kind != "progress":
                result = getattr(response, kind)
            elif progress:
                progress(response.progress)
        return result

    async def _answer(self, method: Any, request: Any) -> Any:
        try:
            return await self._begin(method, request, timeout=STATUS_SECONDS)
        except asyncio.CancelledError:
            # Closing ends the call so too, which would pass for this task's own end.
            if not is_cancelled():
                self._lifetime.require_open()
            raise
        except grpc.RpcError as error:
            self._lifetime.require_open()
            raise readable(error, self._endpoint) from None

    def _begin(self, method: Any, request: Any, **options: Any) -> Any:
        self._lifetime.require_open()
        return method(request, metadata=self._metadata, **options)

    def _stream(self, method: Any, request: Any, read: Callable[[Any], T]) -> AsyncStream[T]:
        call, patience = partial(self._begin, method, request), Patience(self._retry_seconds)
        return AsyncStream(call, patience, self._endpoint, self._lifetime, read)

    async def close(self) -> None:
        """Closes the connection; streams that are open end, and later calls are refused."""
        self._lifetime.require_here()
        self._lifetime.closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
