"""Whatever is sent to TrainingService is answered by a documented code, and costs no memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apollo_grpc.errors import from_rpc_error
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub
from tests.server_process import served

EXAMPLES = int(os.environ.get("SOAK_MALFORMED", "300"))
CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
REQUESTS = {
    "Train": pb.TrainRequest,
    "WatchRun": pb.WatchRunRequest,
    "GetRun": pb.GetRunRequest,
    "ListRuns": pb.ListRunsRequest,
    "CancelRun": pb.CancelRunRequest,
}
STREAMS = {"Train", "WatchRun"}
MAX_GROWTH_KIB = 16 * 1024

Field = descriptor.FieldDescriptor
# An odd value where there is one; a plain one now and then, so that later checks are reached.
_INTS = {
    32: st.sampled_from([0, 1, 2, -1, 259, 2**31 - 1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1),
    64: st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1),
}
_FLOATS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-5, 1e308, float("inf"), float("nan")])
_TEXT = st.sampled_from(["", "a", "assistant", "user", "\0", "ß" * 400]) | st.text(max_size=20)
_SCALARS = {
    Field.TYPE_STRING: _TEXT,
    Field.TYPE_BOOL: st.booleans(),
    Field.TYPE_INT32: _INTS[32],
    Field.TYPE_ENUM: st.sampled_from([0, 1, 2, 3, 99, -1]),
    Field.TYPE_INT64: _INTS[64],
    Field.TYPE_DOUBLE: _FLOATS | st.floats(),
}


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """A message of any content: each field unset, plain or odd."""
    message: Any = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.integers(0, 2)):
            continue
        inner = field.message_type and field.message_type._concrete_class
        values = messages(inner) if inner else _SCALARS[field.type]
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values, max_size=3)))
        elif inner:
            getattr(message, field.name).CopyFrom(draw(values))
        else:
            setattr(message, field.name, draw(values))
    return message


@pytest.fixture(scope="module")
def calls(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A caller of a server of its own, attached, for all requests."""
    with served(tiny_model) as server:
        caller = Caller(server.address)
        caller.memory_kib = server.memory_kib
        yield caller


class Caller:
    """What a hostile client has."""

    def __init__(self, address: str):
        self.channel = Endpoint(address).channel()
        self.training = TrainingServiceStub(self.channel)
        self.memory_kib: Callable[[], int] = lambda: 0

    def cancel(self, run_id: str) -> None:
        self.training.CancelRun(pb.CancelRunRequest(run_id=run_id), timeout=30)


def ask(caller: Any, method: str, request: Message) -> grpc.StatusCode:
    """The code of the answer; a run that was taken is cancelled."""
    call = getattr(caller.training, method)
    try:
        if method not in STREAMS:
            call(request, timeout=30)
            return grpc.StatusCode.OK
        stream = call(request, timeout=30)
        for answer in stream:
            caller.cancel(answer.event.run_id)
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        found = from_rpc_error(error)
        assert found.code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), (
            method,
            request,
            found.message,
        )
        return found.code


@pytest.mark.parametrize("method", REQUESTS)
def test_any_request_is_answered_by_a_documented_code(calls: Any, method: str) -> None:
    @settings(
        max_examples=EXAMPLES // len(REQUESTS),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(request=messages(REQUESTS[method]))
    def send(request: Message) -> None:
        code = ask(calls, method, request)
        assert code is grpc.StatusCode.OK or code in CODES, (code, request)

    send()


def test_wrong_requests_leave_nothing_behind_in_memory(calls: Any) -> None:
    wrong = pb.TrainRequest(request_id="a", spec=pb.RunSpec())
    sample = wrong.spec.samples.add()
    sample.tokens.context_ids.extend([-1] * 20_000)
    for _ in range(50):
        assert ask(calls, "Train", wrong) is grpc.StatusCode.INVALID_ARGUMENT
    before = calls.memory_kib()
    for _ in range(EXAMPLES):
        assert ask(calls, "Train", wrong) is grpc.StatusCode.INVALID_ARGUMENT
    assert calls.memory_kib() - before < MAX_GROWTH_KIB


def test_bytes_that_are_no_message_are_refused(calls: Any) -> None:
    method = calls.channel.unary_unary("/apollo.v1.TrainingService/GetRun")
    with pytest.raises(grpc.RpcError) as caught:
        method(b"\xff\xff\xff", timeout=30)
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_UNREADABLE")
