"""Whatever is sent to any RPC is answered by a documented code, and costs no memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apollo_grpc.sidecar.v1 import weight_export_pb2
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import checkpoint_pb2, dataset_pb2, status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub
from tests.engine_double import EngineDouble
from tests.server_process import served
from tests.waiting import HANG

EXAMPLES = int(os.environ.get("SOAK_MALFORMED", "300"))
CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Of another weight version than the expected one.
    grpc.StatusCode.ABORTED,
    # Of a cancelled job, which a request's id attaches to.
    grpc.StatusCode.CANCELLED,
}
METHODS = {
    method.full_name: method
    for module in (pb, checkpoint_pb2, dataset_pb2, status_pb2, weight_export_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# Streams without an end.
ENDLESS = {"WatchStatus", "WatchRuns", "WatchGeneration"}
# What names a folder of the server's machine.
FOLDERS = {"directory"}
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
    Field.TYPE_UINT64: st.sampled_from([0, 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    Field.TYPE_DOUBLE: _FLOATS | st.floats(),
    Field.TYPE_BYTES: st.binary(max_size=40),
}
_SCALARS[Field.TYPE_UINT32] = st.sampled_from([0, 1, 2**31, 2**32 - 1])
_SCALARS[Field.TYPE_FLOAT] = st.floats(width=32)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """A message of any content: each field unset, plain or odd."""
    message: Any = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.integers(0, 2)):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(draw(st.dictionaries(_TEXT, _TEXT, max_size=3)))
            continue
        inner = field.message_type and field.message_type._concrete_class
        values = messages(inner) if inner else _SCALARS[field.type]
        if field.name in FOLDERS:
            # A folder that does not exist would be made, wherever it is.
            values = values.map(lambda text: text.removeprefix("/"))
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
    model = shutil.copytree(tiny_model, tmp_path_factory.mktemp("malformed") / "model")
    with served(model) as server:
        caller = Caller(server.address)
        caller.memory_kib = server.memory_kib
        # Not the one that is attached: a lease that somebody took would keep its runs waiting.
        address = f"unix:{server.folder}/other.sock"
        engine = EngineDouble(model, address)
        caller.sidecar = Endpoint(address).channel()
        yield caller
        engine.stop()


class Caller:
    """What a hostile client has."""

    sidecar: grpc.Channel

    def __init__(self, address: str):
        self.channel = Endpoint(address).channel()
        self.training = TrainingServiceStub(self.channel)
        self.memory_kib: Callable[[], int] = lambda: 0

    def cancel(self, run_id: str) -> None:
        self.training.CancelRun(pb.CancelRunRequest(run_id=run_id), timeout=HANG)

    def call(self, name: str, request: Message) -> Iterator[Any]:
        """All answers of a method, by its full name."""
        method = METHODS[name]
        channel = self.sidecar if "WeightExport" in name else self.channel
        kind = channel.unary_stream if method.server_streaming else channel.unary_unary
        if method.client_streaming:
            # The stream of one message.
            kind, request = channel.stream_unary, iter([request])
        service, _, short = name.rpartition(".")
        answer = kind(
            f"/{service}/{short}",
            method.input_type._concrete_class.SerializeToString,
            method.output_type._concrete_class.FromString,
        )(request, timeout=HANG)
        if not method.server_streaming:
            yield answer
        elif short in ENDLESS:
            yield next(answer)
            answer.cancel()
        else:
            yield from answer


def ask(caller: Any, method: str, request: Message) -> grpc.StatusCode:
    """The code of the answer; a run that was taken is cancelled."""
    try:
        for answer in caller.call(method, request):
            if method.endswith((".Train", ".WatchRun")):
                caller.cancel(answer.event.run_id)
            elif method.endswith(".CreateRun"):
                caller.cancel(answer.run.run_id)
    except grpc.RpcError as error:
        found = from_rpc_error(error)
        assert found.code in CODES, (method, request, found.code, found.message)
        return found.code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS)
def test_any_request_is_answered_by_a_documented_code(calls: Any, method: str) -> None:
    @settings(
        max_examples=max(10, EXAMPLES // len(METHODS)),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(request=messages(METHODS[method].input_type._concrete_class))
    def send(request: Message) -> None:
        ask(calls, method, request)

    send()


TRAIN = "apollo.v1.TrainingService.Train"


def test_wrong_requests_leave_nothing_behind_in_memory(calls: Any) -> None:
    wrong = pb.TrainRequest(request_id="a", spec=pb.RunSpec())
    sample = wrong.spec.samples.add()
    sample.tokens.context_ids.extend([-1] * 20_000)
    for _ in range(50):
        assert ask(calls, TRAIN, wrong) is grpc.StatusCode.INVALID_ARGUMENT
    before = calls.memory_kib()
    for _ in range(EXAMPLES):
        assert ask(calls, TRAIN, wrong) is grpc.StatusCode.INVALID_ARGUMENT
    assert calls.memory_kib() - before < MAX_GROWTH_KIB


@pytest.mark.parametrize("name", METHODS)
def test_bytes_that_are_no_message_are_refused(calls: Any, name: str) -> None:
    service, _, short = name.rpartition(".")
    channel = calls.sidecar if "WeightExport" in name else calls.channel
    with pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(f"/{service}/{short}")(b"\xff\xff\xff", timeout=HANG))
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_UNREADABLE")
