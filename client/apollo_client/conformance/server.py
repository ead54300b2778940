"""The server that is tried: every method by its request, and runs that are taken away again."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from apollo_client.conformance.refusals import Refusal, refusal_of
from apollo_client.conformance.requirements import (
    NotApplicableError,
    require,
    require_equal,
    shown,
)
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import checkpoint_pb2, dataset_pb2, status_pb2
from apollo_grpc.v1 import training_pb2 as pb

SERVICES = [
    service
    for file in (checkpoint_pb2, dataset_pb2, status_pb2, pb)
    for service in file.DESCRIPTOR.services_by_name.values()
]
METHODS = {method.full_name: method for service in SERVICES for method in service.methods}
# Each request is of one method.
METHOD_OF = {method.input_type.full_name: method for method in METHODS.values()}
LABEL = "apollo-conformance"
# A run that nobody ends, as where this command was killed.
LONGEST = Duration(seconds=60)
LONG_EPOCHS = 100_000
# By these codes a server tells that it cannot now, and not that the request is wrong.
NOT_NOW = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.PERMISSION_DENIED,
)


def sample(first: int, tokens: int = 4) -> pb.Sample:
    """A sample of small token ids, which any vocabulary has."""
    ids = pb.TokenSample(context_ids=[first, 2, 3], continuation_ids=range(4, 4 + tokens))
    return pb.Sample(tokens=ids)


class Server:
    """One server, by the calls of the contract.

    Args:
        seconds: that a call may take.
        folder: of the server's machine, absolute, which it may write to; empty for none.

    Attributes:
        tag: label of every run that is made here.
        called: methods that were called.
        at_end: requests that take away what was made, in the order in which it was.
    """

    def __init__(self, endpoint: Endpoint, seconds: float, folder: str = ""):
        self._channel, self._metadata = endpoint.channel(), endpoint.metadata()
        self._seconds, self.folder = seconds, folder
        self.tag = uuid.uuid4().hex[:16]
        self.called: set[str] = set()
        self.at_end: list[Any] = []
        self._names = 0

    # --- calls --------------------------------------------------------------------------------

    def stream(self, request: Any, *more: Any) -> Any:
        """The answers of a method, one or many; the more messages, of one that takes them."""
        method = METHOD_OF[request.DESCRIPTOR.full_name]
        self.called.add(method.full_name)
        path = f"/{method.containing_service.full_name}/{method.name}"
        return self.raw(path, (each.SerializeToString() for each in (request, *more)), method)

    def raw(self, path: str, messages: Iterable[bytes], method: Any = None) -> Any:
        """The answers of any method, and as bytes where it is not given."""
        reader = method.output_type._concrete_class.FromString if method else None
        # Whatever a method takes and gives, on the wire it is this.
        call: Any = self._channel.stream_stream(path, None, reader)
        return call(iter(messages), timeout=self._seconds, metadata=self._metadata)

    def ask(self, request: Any, *more: Any) -> Any:
        """The one answer of a method."""
        answers = list(self.stream(request, *more))
        require_equal(len(answers), 1, f"{request.DESCRIPTOR.name}: answers")
        return answers[0]

    def refused(
        self,
        request: Any,
        code: grpc.StatusCode,
        reason: str = "",
        fields: Sequence[str] | None = None,
    ) -> Refusal:
        """How a request is refused, which it must be, by this code, reason and wrong fields."""
        what = f"{request.DESCRIPTOR.name} {{{shown(request)}}}"
        try:
            answers = list(self.stream(request))
        except grpc.RpcError as error:
            found = refusal_of(error, what)
        else:
            require(False, f"{what} was answered: {shown(answers)}")
        told = f"{what} ended with {found.code.name}, {found.reason}, {found.fields}"
        require(found.code is code, f"{told} in place of {code.name}")
        require(not reason or found.reason == reason, f"{told} in place of {reason}")
        require(fields is None or found.fields == list(fields), f"{told} in place of {fields}")
        return found

    def close(self) -> None:
        """Takes away what was made; what cannot be is left."""
        for request in reversed(self.at_end):
            with suppress(grpc.RpcError):
                if isinstance(request, pb.DeleteRunRequest):
                    self.end(request.run_id)
                list(self.stream(request))
        self._channel.close()

    # --- what is asked often ------------------------------------------------------------------

    def status(self) -> Any:
        """The status now."""
        return self.ask(status_pb2.GetStatusRequest()).status

    @cached_property
    def info(self) -> Any:
        """The server info, as it was when it was first asked for."""
        return self.ask(status_pb2.GetServerInfoRequest())

    def require_ready(self) -> None:
        """Raises NotApplicableError where the server takes no runs as it is, and says why."""
        if self._why_not_ready:
            raise NotApplicableError(self._why_not_ready)

    @cached_property
    def _why_not_ready(self) -> str:
        try:
            self.ask(pb.ValidateRunRequest(spec=self.spec()))
        except grpc.RpcError as error:
            found: Any = error
            if found.code() in NOT_NOW:
                return f"it takes no runs now: {found.details()}"
        return ""

    # --- runs ---------------------------------------------------------------------------------

    def name(self) -> str:
        """A word that nothing else has."""
        self._names += 1
        return f"{LABEL}-{self.tag}-{self._names}"

    def spec(self, **fields: Any) -> pb.RunSpec:
        """A run of one sample that writes nothing, unless the fields say otherwise."""
        fields.setdefault("labels", {LABEL: self.tag})
        fields.setdefault("dry_run", True)
        # Where the model knows the samples it takes its steps all the same.
        fields.setdefault("guard", pb.Guard(min_loss=0))
        if "dataset_id" not in fields:
            fields.setdefault("samples", [sample(1)])
        return pb.RunSpec(**fields)

    def update(self, **fields: Any) -> pb.RunSpec:
        """A run of one step that is an update, and leaves each weight as it is."""
        still = pb.OptimizerConfig(lr=0, weight_decay=0)
        return self.spec(dry_run=False, optimizer=still, **fields)

    def begin(self, spec: pb.RunSpec, request_id: str = "") -> Generator[pb.RunEvent, None, None]:
        """The events of `Train`, as they come."""
        call = self.stream(pb.TrainRequest(request_id=request_id, spec=spec))
        try:
            for number, answer in enumerate(call):
                if not number:
                    self.at_end.append(pb.DeleteRunRequest(run_id=answer.event.run_id))
                yield answer.event
        finally:
            call.cancel()

    def train(self, request_id: str = "", **fields: Any) -> list[pb.RunEvent]:
        """The events of a run, by `Train`."""
        return list(self.begin(self.spec(**fields), request_id))

    def create(self, request_id: str = "", **fields: Any) -> pb.Run:
        """A run, by `CreateRun`."""
        request = pb.CreateRunRequest(request_id=request_id, spec=self.spec(**fields))
        run: pb.Run = self.ask(request).run
        self.at_end.append(pb.DeleteRunRequest(run_id=run.run_id))
        return run

    @contextmanager
    def long(self, request_id: str = "", **fields: Any) -> Iterator[str]:
        """A run that has begun, and has not ended before the block does; its id."""
        spec = self.spec(epochs=LONG_EPOCHS, max_wall_time=LONGEST, **fields)
        run_id = ""
        events = self.begin(spec, request_id)
        try:
            for event in events:
                run_id = event.run_id
                if event.HasField("started"):
                    break
            yield run_id
        finally:
            events.close()
            if run_id:
                self.end(run_id)

    def end(self, run_id: str) -> list[pb.RunEvent]:
        """Cancels a run and waits for its end; all its events."""
        self.ask(pb.CancelRunRequest(run_id=run_id))
        return self.events(run_id)

    def events(self, run_id: str, after: int = 0) -> list[pb.RunEvent]:
        """The events of a run, by `WatchRun`."""
        request = pb.WatchRunRequest(run_id=run_id, after_sequence=after)
        return [answer.event for answer in self.stream(request)]

    def run(self, run_id: str, view: pb.RunView.ValueType = pb.RUN_VIEW_BASIC) -> pb.Run:
        """A run as it is now."""
        run: pb.Run = self.ask(pb.GetRunRequest(run_id=run_id, view=view)).run
        return run

    @cached_property
    def ended(self) -> list[pb.RunEvent]:
        """The events of a run of four steps, which has ended."""
        two = [sample(1), sample(9, 5)]
        return self.train(samples=two, epochs=2, evaluate=True, name=self.tag)


def steps_of(events: Sequence[pb.RunEvent]) -> list[pb.RunEvent.Step]:
    """The steps among events."""
    return [event.step for event in events if event.HasField("step")]


def finished(events: Sequence[pb.RunEvent]) -> pb.RunEvent.Finished:
    """How a run ended; it must have."""
    last = events[-1] if events else pb.RunEvent()
    require(last.HasField("finished"), f"the last event is {shown(last)}")
    return last.finished


def started(events: Sequence[pb.RunEvent]) -> pb.RunEvent.Started:
    """How a run began; it must have."""
    found = [event.started for event in events if event.HasField("started")]
    require_equal(len(found), 1, "`started` events of a run")
    return found[0]
