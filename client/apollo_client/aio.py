"""The asyncio client: the same calls as the blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc.aio

from apollo_client.connection import STATUS_SECONDS, find_server, readable
from apollo_client.requests import RunOptions, run_spec, watch_request
from apollo_client.samples import SampleLike
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import checkpoint_pb2, status_pb2, training_pb2
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub

T = TypeVar("T")


class AsyncStream(Generic[T]):
    """Messages of one call, as they arrive. Raises the `ApolloError` that ended it, if one did."""

    def __init__(self, call: Any, endpoint: Endpoint, read: Callable[[Any], T]):
        self._call, self._endpoint, self._read = call, endpoint, read
        self._left = False

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            message = await self._call.read()
        except asyncio.CancelledError:
            # Also raised for a call that was left, which would pass for this task's own end.
            if self._left:
                raise StopAsyncIteration from None
            raise
        except grpc.RpcError as error:
            raise readable(error, self._endpoint) from None
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return self._read(message)

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


class AsyncApolloClient:
    """`ApolloClient` for asyncio; belongs to the event loop on which it was made.

    Takes the same arguments and raises the same errors.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ):
        self._endpoint = find_server(address, token, ca, certificate, key)
        self._metadata = self._endpoint.metadata()
        self._channel = self._endpoint.aio_channel()
        # The stubs' types name the blocking channel; at run time they take either.
        channel: Any = self._channel
        self._training: Any = TrainingServiceStub(channel)
        self._checkpoints: Any = CheckpointServiceStub(channel)
        self._status: Any = StatusServiceStub(channel)

    def train(
        self, samples: Iterable[SampleLike], **options: Unpack[RunOptions]
    ) -> AsyncStream[training_pb2.RunEvent]:
        """Starts a run and returns its events; see `ApolloClient.train`."""
        return self.train_spec(run_spec(samples, options))

    def train_spec(self, spec: training_pb2.RunSpec) -> AsyncStream[training_pb2.RunEvent]:
        """The same for a spec that the caller built."""
        request = training_pb2.TrainRequest(spec=spec)
        return self._stream(self._training.Train, request, lambda response: response.event)

    async def status(self) -> status_pb2.ServerStatus:
        """How the server is now."""
        try:
            response: status_pb2.GetStatusResponse = await self._status.GetStatus(
                status_pb2.GetStatusRequest(), timeout=STATUS_SECONDS, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise readable(error, self._endpoint) from None
        return response.status

    def watch(
        self, run_id: str = "", min_interval: float = 0.0
    ) -> AsyncStream[status_pb2.WatchStatusResponse]:
        """The status first, then what happens; see `ApolloClient.watch`."""
        request = watch_request(run_id, min_interval)
        return self._stream(self._status.WatchStatus, request, lambda response: response)

    async def sync(
        self, progress: Callable[[checkpoint_pb2.Progress], None] | None = None
    ) -> checkpoint_pb2.SyncResult:
        """Brings the model directory up to date with the live weights."""
        result = checkpoint_pb2.SyncResult()
        stream: AsyncStream[checkpoint_pb2.SyncResponse] = self._stream(
            self._checkpoints.Sync, checkpoint_pb2.SyncRequest(), lambda response: response
        )
        async for response in stream:
            if response.HasField("result"):
                result = response.result
            elif progress:
                progress(response.progress)
        return result

    def _stream(self, method: Any, request: Any, read: Callable[[Any], T]) -> AsyncStream[T]:
        return AsyncStream(method(request, metadata=self._metadata), self._endpoint, read)

    async def close(self) -> None:
        """Closes the connection; streams that are open end."""
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
