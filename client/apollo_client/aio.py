"""The asyncio client: the same calls as the blocking one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc.aio

from apollo_client.aio_calls import AsyncRunCalls
from apollo_client.aio_checkpoint_calls import AsyncCheckpointCalls
from apollo_client.aio_dataset_calls import AsyncDatasetCalls
from apollo_client.aio_sample_calls import AsyncSampleCalls
from apollo_client.aio_streams import AsyncRunsStream, AsyncRunStream, AsyncStream
from apollo_client.connection import RETRY_SECONDS, STATUS_SECONDS, find_server, readable
from apollo_client.lifetime import Lifetime, is_cancelled, running_loop
from apollo_grpc import traces
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from apollo_grpc.v1.dataset_pb2_grpc import DatasetServiceStub
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub

__all__ = ["AsyncApolloClient", "AsyncRunStream", "AsyncRunsStream", "AsyncStream"]


class AsyncApolloClient(AsyncRunCalls, AsyncSampleCalls, AsyncDatasetCalls, AsyncCheckpointCalls):
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
        self._training = TrainingServiceStub(channel)
        self._checkpoints = CheckpointServiceStub(channel)
        self._datasets = DatasetServiceStub(channel)
        self._status = StatusServiceStub(channel)

    async def _answer(
        self, method: Any, request: Any, seconds: float | None = STATUS_SECONDS
    ) -> Any:
        try:
            return await self._begin(method, request, timeout=seconds)
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
        metadata = (*self._metadata, *traces.outgoing())
        return method(request, metadata=metadata, **options)

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
