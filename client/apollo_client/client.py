"""The blocking client."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from apollo_client.calls import RunCalls
from apollo_client.checkpoint_calls import CheckpointCalls
from apollo_client.connection import RETRY_SECONDS, STATUS_SECONDS, find_server, readable
from apollo_client.dataset_calls import DatasetCalls
from apollo_client.lifetime import Lifetime
from apollo_client.sample_calls import SampleCalls
from apollo_client.streams import RunsStream, RunStream, Stream
from apollo_grpc import traces
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from apollo_grpc.v1.dataset_pb2_grpc import DatasetServiceStub
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub

__all__ = ["ApolloClient", "RunStream", "RunsStream", "Stream"]


class ApolloClient(RunCalls, SampleCalls, DatasetCalls, CheckpointCalls):
    """Trains the model that vLLM serves, and says how that goes. Safe to share between threads.

    Args:
        address: `unix:PATH` or `host:port`; else $APOLLO_ADDRESS, else the user's own socket.
        token: of a TCP server; else of $APOLLO_TOKEN_FILE, else $APOLLO_TOKEN, else, on this
            machine, the state folder's.
        ca, certificate, key: PEM files for TLS and mTLS; else $APOLLO_CA, $APOLLO_CERTIFICATE and
            $APOLLO_KEY.
        retry_seconds: for how long a run's events, or an operation's result, are asked for again
            when the server goes away, as it does when it is restarted, and a stream when too many
            are open; 0: not at all.

    Belongs to the process that made it: FailedPrecondition in a forked one, and once it is closed.
    Every method raises `ApolloError`, never `grpc.RpcError`: `Unavailable` when no server or no
    engine is there, `InvalidArgument` with the path of each wrong field.
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
        self._lifetime = Lifetime()
        self._endpoint = find_server(address, token, ca, certificate, key)
        self._metadata, self._retry_seconds = self._endpoint.metadata(), retry_seconds
        self._channel = self._endpoint.channel()
        self._training = TrainingServiceStub(self._channel)
        self._checkpoints = CheckpointServiceStub(self._channel)
        self._datasets = DatasetServiceStub(self._channel)
        self._status = StatusServiceStub(self._channel)

    def _answer(self, method: Any, request: Any, seconds: float | None = STATUS_SECONDS) -> Any:
        try:
            return self._begin(method, request, timeout=seconds)
        except grpc.RpcError as error:
            self._lifetime.require_open()
            raise readable(error, self._endpoint) from None

    def _begin(self, method: Any, request: Any, **options: Any) -> Any:
        self._lifetime.require_open()
        try:
            metadata = (*self._metadata, *traces.outgoing())
            return method(request, metadata=metadata, **options)
        except ValueError:
            # Another thread closed it meanwhile.
            self._lifetime.require_open()
            raise

    def close(self) -> None:
        """Closes the connection; streams that are open end, and later calls are refused."""
        self._lifetime.closed = True
        # In a forked process the channel's threads are missing, and closing would wait for them.
        if self._lifetime.is_own_process():
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
