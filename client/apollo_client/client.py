"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from apollo_client.connection import STATUS_SECONDS, find_server, readable
from apollo_client.requests import RunOptions, run_spec, watch_request
from apollo_client.samples import SampleLike
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import checkpoint_pb2, status_pb2, training_pb2
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub

T = TypeVar("T")


class Stream(Generic[T]):
    """Messages of one call, as they arrive. Raises the `ApolloError` that ended it, if one did."""

    def __init__(self, call: Any, endpoint: Endpoint, read: Callable[[Any], T]):
        self._call, self._endpoint, self._read = call, endpoint, read
        self._left = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._read(next(self._call))
        except grpc.RpcError as error:
            if self._left:
                raise StopIteration from None
            raise readable(error, self._endpoint) from None

    def close(self) -> None:
        """Leaves the stream: iterating it ends. What it watched goes on."""
        self._left = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ApolloClient:
    """Trains the model that vLLM serves, and says how that goes. Safe to share between threads.

    Args:
        address: `unix:PATH` or `host:port`; else $APOLLO_ADDRESS, else the user's own socket.
        token: of a TCP server; else $APOLLO_TOKEN, else the token in the user's state folder.
        ca, certificate, key: PEM files for TLS and mTLS.

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
    ):
        self._endpoint = find_server(address, token, ca, certificate, key)
        self._metadata = self._endpoint.metadata()
        self._channel = self._endpoint.channel()
        self._training = TrainingServiceStub(self._channel)
        self._checkpoints = CheckpointServiceStub(self._channel)
        self._status = StatusServiceStub(self._channel)

    def train(
        self, samples: Iterable[SampleLike], **options: Unpack[RunOptions]
    ) -> Stream[training_pb2.RunEvent]:
        """Starts a run and returns its events; the last one is `finished`.

        The run begins now, and goes on when the stream is left. A run that fails raises nothing:
        its `finished` event says so. A step's loss is in `event.step.loss`.
        """
        return self.train_spec(run_spec(samples, options))

    def train_spec(self, spec: training_pb2.RunSpec) -> Stream[training_pb2.RunEvent]:
        """The same for a spec that the caller built, with all that the contract has."""
        request = training_pb2.TrainRequest(spec=spec)
        return self._stream(self._training.Train, request, lambda response: response.event)

    def status(self) -> status_pb2.ServerStatus:
        """How the server is now."""
        try:
            return self._status.GetStatus(
                status_pb2.GetStatusRequest(), timeout=STATUS_SECONDS, metadata=self._metadata
            ).status
        except grpc.RpcError as error:
            raise readable(error, self._endpoint) from None

    def watch(
        self, run_id: str = "", min_interval: float = 0.0
    ) -> Stream[status_pb2.WatchStatusResponse]:
        """The status first, then events of runs and changes of status, as they happen.

        Args:
            run_id: only events of this run; empty means all.
            min_interval: seconds between two statuses; events are not held back.
        """
        request = watch_request(run_id, min_interval)
        return self._stream(self._status.WatchStatus, request, lambda response: response)

    def sync(
        self, progress: Callable[[checkpoint_pb2.Progress], None] | None = None
    ) -> checkpoint_pb2.SyncResult:
        """Brings the model directory up to date with the live weights."""
        result = checkpoint_pb2.SyncResult()
        for response in self._stream(
            self._checkpoints.Sync, checkpoint_pb2.SyncRequest(), lambda response: response
        ):
            if response.HasField("result"):
                result = response.result
            elif progress:
                progress(response.progress)
        return result

    def _stream(self, method: Any, request: Any, read: Callable[[Any], T]) -> Stream[T]:
        return Stream(method(request, metadata=self._metadata), self._endpoint, read)

    def close(self) -> None:
        """Closes the connection; streams that are open end."""
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
