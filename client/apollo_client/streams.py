"""Streams of the blocking client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from apollo_client.connection import readable
from apollo_client.lifetime import Lifetime
from apollo_client.resume import Patience, Resume, RunsResume
from apollo_client.run_result import RunRecord, RunResult, left
from apollo_grpc.errors import ApolloError
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import training_pb2

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


class ResumedStream(Stream[T]):
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

    def __next__(self) -> T:
        while not self._resume.ended:
            try:
                message = super().__next__()
            except StopIteration:
                self._again(None)
                continue
            if self._resume.take(message):
                return message
        raise StopIteration


class RunStream(ResumedStream[training_pb2.RunEvent]):
    """The events of one run, none lost and none twice, also when the server is restarted."""

    def __init__(
        self, begin: Begin, stub: Any, resume: Resume, endpoint: Endpoint, lifetime: Lifetime
    ):
        super().__init__(begin, stub, resume, endpoint, lifetime, lambda response: response.event)
        self._record, self._ahead = RunRecord(), list[training_pb2.RunEvent]()

    def __next__(self) -> training_pb2.RunEvent:
        if self._ahead and not self._has_left():
            return self._ahead.pop()
        event = super().__next__()
        self._record.take(event)
        return event

    @property
    def run_id(self) -> str:
        """The run's id, at once where it is known; else the first event tells it, and is kept.

        Raises as iterating does, and FailedPrecondition where the stream was left before.
        """
        if not self._resume.run_id:
            self._ahead += islice(self, 1)
        if not self._resume.run_id:
            raise left("id")
        return str(self._resume.run_id)

    def result(self) -> RunResult:
        """What the run came to, once it has ended; reads the events that are left.

        Raises as iterating does, and FailedPrecondition where the stream was left. A run that
        failed raises nothing: `raise_for_failure` of the result does.
        """
        for _ in self:
            pass
        return self._record.result()


class RunsStream(ResumedStream[training_pb2.WatchRunsResponse]):
    """The events of all runs with their revisions, none lost and none twice, over restarts."""

    def __init__(
        self, begin: Begin, stub: Any, resume: RunsResume, endpoint: Endpoint, lifetime: Lifetime
    ):
        super().__init__(begin, stub, resume, endpoint, lifetime, lambda response: response)
