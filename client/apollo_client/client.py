"""The blocking client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from apollo_client.connection import RETRY_SECONDS, STATUS_SECONDS, find_server, readable
from apollo_client.requests import (
    RunOptions,
    list_request,
    run_spec,
    train_request,
    watch_request,
)
from apollo_client.resume import Resume
from apollo_client.samples import SampleLike
from apollo_grpc.errors import ApolloError
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import checkpoint_pb2, status_pb2, training_pb2
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub

T = TypeVar("T")
Told = Callable[[checkpoint_pb2.Progress], None]


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


class RunStream(Stream[training_pb2.RunEvent]):
    """The events of one run, none lost and none twice, also when the server is restarted."""

    def __init__(self, stub: Any, resume: Resume, endpoint: Endpoint, metadata: Any):
        self._stub, self._resume, self._metadata = stub, resume, metadata
        self._leaving = threading.Event()
        super().__init__(self._open(), endpoint, lambda response: response.event)

    def _open(self) -> Any:
        request = self._resume.request()
        known = isinstance(request, training_pb2.WatchRunRequest)
        method = self._stub.WatchRun if known else self._stub.Train
        return method(request, metadata=self._metadata)

    def __next__(self) -> training_pb2.RunEvent:
        while not self._resume.ended:
            error: ApolloError | None = None
            try:
                event = super().__next__()
            except StopIteration:
                if self._left:
                    raise
            except ApolloError as raised:
                error = raised
            else:
                if self._resume.take(event):
                    return event
                continue
            # Left meanwhile: nobody waits for the next event.
            if self._leaving.wait(self._resume.wait_after(error)):
                break
            self._call = self._open()
        raise StopIteration

    def close(self) -> None:
        """Leaves the stream: iterating it ends. The run goes on."""
        self._leaving.set()
        super().close()


class ApolloClient:
    """Trains the model that vLLM serves, and says how that goes. Safe to share between threads.

    Args:
        address: `unix:PATH` or `host:port`; else $APOLLO_ADDRESS, else the user's own socket.
        token: of a TCP server; else $APOLLO_TOKEN, else the token in the user's state folder.
        ca, certificate, key: PEM files for TLS and mTLS.
        retry_seconds: for how long a run's events are asked for again when the server goes away,
            as it does when it is restarted; 0: not at all.

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
        return self.train_spec(run_spec(samples, options), request_id=request_id)

    def train_spec(self, spec: training_pb2.RunSpec, *, request_id: str | None = None) -> RunStream:
        """The same for a spec that the caller built, with all that the contract has."""
        return self._follow(train_request(spec, request_id))

    def watch_run(self, run_id: str, after_sequence: int = 0) -> RunStream:
        """The events of a run after a sequence, until it has finished.

        Raises NotFound for a run that is not known, OutOfRange for events that were pruned.
        """
        request = training_pb2.WatchRunRequest(run_id=run_id, after_sequence=after_sequence)
        return self._follow(request)

    def _follow(
        self, request: training_pb2.TrainRequest | training_pb2.WatchRunRequest
    ) -> RunStream:
        resume = Resume(request, self._retry_seconds)
        return RunStream(self._training, resume, self._endpoint, self._metadata)

    def get_run(self, run_id: str) -> training_pb2.Run:
        """One run with its spec. Raises NotFound for one that is not known."""
        request = training_pb2.GetRunRequest(run_id=run_id)
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
        request = training_pb2.CancelRunRequest(run_id=run_id)
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

    def sync(
        self,
        progress: Told | None = None,
        *,
        in_place: bool = False,
    ) -> checkpoint_pb2.SyncResult:
        """Brings the model directory up to date with the live weights.

        Args:
            in_place: write into the files, for disks without room for new ones.
        """
        methods = (checkpoint_pb2.SYNC_METHOD_UNSPECIFIED, checkpoint_pb2.SYNC_METHOD_IN_PLACE)
        request = checkpoint_pb2.SyncRequest(method=methods[in_place])
        result: checkpoint_pb2.SyncResult = self._result(self._checkpoints.Sync, request, progress)
        return result

    def verify(
        self, *, full: bool = False, live: bool = False, progress: Told | None = None
    ) -> checkpoint_pb2.VerifyResult:
        """Compares the model directory with what the last sync left there.

        Args:
            full: read every file, and compare digests.
            live: compare the live weights too.
        """
        request = checkpoint_pb2.VerifyRequest(full=full, live=live)
        result: checkpoint_pb2.VerifyResult = self._result(
            self._checkpoints.Verify, request, progress
        )
        return result

    def adopt(
        self, directory: str | Path, progress: Told | None = None
    ) -> checkpoint_pb2.AdoptResult:
        """Makes a private copy of the model directory, in a new folder of the server's machine."""
        request = checkpoint_pb2.AdoptRequest(directory=str(directory))
        result: checkpoint_pb2.AdoptResult = self._result(
            self._checkpoints.Adopt, request, progress
        )
        return result

    def _result(self, method: Any, request: Any, progress: Told | None) -> Any:
        """The last message's result of a stream that tells its progress before."""
        result = None
        for response in self._stream(method, request, lambda response: response):
            if response.HasField("result"):
                result = response.result
            elif progress:
                progress(response.progress)
        return result

    def _answer(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=STATUS_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            raise readable(error, self._endpoint) from None

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
