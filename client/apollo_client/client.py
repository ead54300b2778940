"""The blocking client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from apollo_client.checkpoint_calls import CheckpointCalls
from apollo_client.connection import (
    RETRY_SECONDS,
    STATUS_SECONDS,
    Told,
    find_server,
    message,
    readable,
)
from apollo_client.lifetime import Lifetime
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


class Stream(Generic[T]):
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
        self._leaving = threading.Event()
        self._call = call()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while True:
            self._lifetime.require_here()
            try:
                message = next(self._call)
            except grpc.RpcError as raised:
                if self._lifetime.closed:
                    raise StopIteration from None
                error = readable(raised, self._endpoint)
            else:
                self._patience.heard()
                return self._read(message)
            self._again(error)

    def _again(self, error: ApolloError | None) -> None:
        """Makes the call again, in a while; raises where that makes no sense."""
        # Left meanwhile: nobody waits for the next message.
        if self._has_left() or self._leaving.wait(self._patience.wait_after(error)):
            raise StopIteration
        if self._has_left():
            raise StopIteration
        self._call = self._open()

    def _has_left(self) -> bool:
        return self._lifetime.closed or self._leaving.is_set()

    def close(self) -> None:
        """Leaves the stream: iterating it ends. What it watched goes on."""
        self._leaving.set()
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


class RunStream(Stream[training_pb2.RunEvent]):
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

    def __next__(self) -> training_pb2.RunEvent:
        while not self._resume.ended:
            try:
                event = super().__next__()
            except StopIteration:
                self._again(None)
                continue
            if self._resume.take(event):
                return event
        raise StopIteration


class ApolloClient(CheckpointCalls):
    """Trains the model that vLLM serves, and says how that goes. Safe to share between threads.

    Args:
        address: `unix:PATH` or `host:port`; else $APOLLO_ADDRESS, else the user's own socket.
        token: of a TCP server; else $APOLLO_TOKEN, else the token in the user's state folder.
        ca, certificate, key: PEM files for TLS and mTLS.
        retry_seconds: for how long a run's events are asked for again when the server goes away,
            as it does when it is restarted, and a stream when too many are open; 0: not at all.

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
        self._status = StatusServiceStub(self._channel)

    def train(
        self,
        samples: Iterable[SampleLike],
        *,
        request_id: str | None = None,
        **options: Unpack[RunOptions],
    ) -> RunStream:
        """Starts a run and returns its events; the last one is `finished`.

        The run begins now, and goes on when the stream is left. A run that fails raises nothing:
        its `finished` event says so. A step's loss is in `event.step.loss`.

        Args:
            request_id: the same id with the same spec attaches to the first run, also after a
                restart of either side; with another spec it raises AlreadyExists. None: a new one.
        """
        spec, places = placed_spec(samples, options)
        return self._follow(train_request(spec, request_id, places), places)

    def train_spec(self, spec: training_pb2.RunSpec, *, request_id: str | None = None) -> RunStream:
        """The same for a spec that the caller built, with all that the contract has."""
        return self._follow(train_request(spec, request_id))

    def watch_run(self, run_id: str, after_sequence: int = 0) -> RunStream:
        """The events of a run after a sequence, until it has finished.

        Raises NotFound for a run that is not known, OutOfRange for events that were pruned.
        """
        request = message(
            training_pb2.WatchRunRequest, run_id=run_id, after_sequence=after_sequence
        )
        return self._follow(request)

    def _follow(
        self,
        request: training_pb2.TrainRequest | training_pb2.WatchRunRequest,
        places: Sequence[Place] = (),
    ) -> RunStream:
        resume = Resume(request, self._retry_seconds, places)
        return RunStream(self._begin, self._training, resume, self._endpoint, self._lifetime)

    def get_run(self, run_id: str) -> training_pb2.Run:
        """One run with its spec. Raises NotFound for one that is not known."""
        request = message(training_pb2.GetRunRequest, run_id=run_id)
        run: training_pb2.Run = self._answer(self._training.GetRun, request).run
        return run

    def list_runs(
        self, page_size: int = 0, page_token: str = "", states: Iterable[str | int] = ()
    ) -> training_pb2.ListRunsResponse:
        """A page of runs, newest first, their specs without samples.

        Args:
            page_token: `next_page_token` of the page before, for the same states.
            states: only runs in one of these, such as `"FAILED"`; empty means all.
        """
        request = list_request(page_size, page_token, states)
        page: training_pb2.ListRunsResponse = self._answer(self._training.ListRuns, request)
        return page

    def cancel_run(self, run_id: str) -> training_pb2.Run:
        """Asks a run to stop, and returns at once; a run that has ended stays as it ended."""
        request = message(training_pb2.CancelRunRequest, run_id=run_id)
        run: training_pb2.Run = self._answer(self._training.CancelRun, request).run
        return run

    def status(self) -> status_pb2.ServerStatus:
        """How the server is now."""
        request = status_pb2.GetStatusRequest()
        status: status_pb2.ServerStatus = self._answer(self._status.GetStatus, request).status
        return status

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

    def _result(self, method: Any, request: Any, progress: Told | None) -> Any:
        """The last message's result of a stream that tells its progress before."""
        result = None
        for response in self._stream(method, request, lambda response: response):
            kind = response.WhichOneof("update")
            if kind != "progress":
                result = getattr(response, kind)
            elif progress:
                progress(response.progress)
        return result

    def _answer(self, method: Any, request: Any) -> Any:
        try:
            return self._begin(method, request, timeout=STATUS_SECONDS)
        except grpc.RpcError as error:
            self._lifetime.require_open()
            raise readable(error, self._endpoint) from None

    def _begin(self, method: Any, request: Any, **options: Any) -> Any:
        self._lifetime.require_open()
        try:
            return method(request, metadata=self._metadata, **options)
        except ValueError:
            # Another thread closed it meanwhile.
            self._lifetime.require_open()
            raise

    def _stream(self, method: Any, request: Any, read: Callable[[Any], T]) -> Stream[T]:
        call, patience = partial(self._begin, method, request), Patience(self._retry_seconds)
        return Stream(call, patience, self._endpoint, self._lifetime, read)

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
