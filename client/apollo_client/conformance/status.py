"""StatusService, health, reflection, and what the wire itself is promised to take."""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration

from apollo_client.conformance.promises import promise
from apollo_client.conformance.refusals import refusal_of
from apollo_client.conformance.requirements import (
    NotApplicableError,
    require,
    require_equal,
    shown,
)
from apollo_client.conformance.server import METHODS, SERVICES, Server
from apollo_grpc.v1 import status_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
HEALTHY = b"\x08\x01"
# A ServerReflectionRequest whose `list_services` is set.
LIST_SERVICES = b"\x3a\x00"
REFLECTIONS = ("grpc.reflection.v1", "grpc.reflection.v1alpha")
# Field 1000, a varint.
UNKNOWN_FIELD = b"\xc0\x3e\x01"


@promise(trains=False)
def status_answers_always(server: Server) -> None:
    """GetStatus answers also while no engine is attached: with a state, and what is missing."""
    status = server.status()
    require(status.attachment, f"no attachment state: {shown(status)}")
    require(
        status.attachment == ATTACHED or status.attachment_detail,
        "no detail says why it is not attached",
    )
    require(status.uptime.ToNanoseconds() > 0, f"uptime {shown(status.uptime)}")


@promise(trains=False)
def status_and_info_agree(server: Server) -> None:
    """GetStatus and GetServerInfo speak of one server, and one model where one is attached."""
    status, info = server.status(), server.info
    require(info.server_version, "no server_version")
    require_equal(status.server_version, info.server_version, "server_version of the status")
    is_attached = status.attachment == ATTACHED
    require_equal(info.HasField("model"), is_attached, "a model in the info, while attached")
    if is_attached:
        require_equal(info.model.directory, status.model, "the model's directory")
        require_equal(
            info.model.parameters, status.weight_memory.parameters, "the model's parameters"
        )
        require(status.engine_epoch, "no engine_epoch")


@promise(trains=False)
def limits_are_told(server: Server) -> None:
    """GetServerInfo tells what is refused beyond: every limit, none of them 0."""
    limits = server.info.limits
    unset = [f.name for f in limits.DESCRIPTOR.fields if getattr(limits, f.name) <= 0]
    require(not unset, f"limits that are 0: {unset}")


@promise()
def the_model_is_told(server: Server) -> None:
    """GetServerInfo tells the attached model's class, vocabulary, length, type and modes."""
    model = server.info.model
    names = ("architecture", "vocabulary", "max_length", "dtype", "parameters", "coherence_modes")
    unset = [name for name in names if not getattr(model, name)]
    require(not unset, f"unset: {unset}")


@promise(trains=False)
def a_watch_begins_with_a_status(server: Server) -> None:
    """WatchStatus streams a snapshot first."""
    call = server.stream(status_pb2.WatchStatusRequest())
    first = next(call)
    call.cancel()
    require(first.HasField("status"), f"the first message is {shown(first)}")


@promise()
def a_watch_tells_every_event_or_how_many_are_lost(server: Server) -> None:
    """WatchStatus streams run events as they happen; a slow subscriber is told what it lost."""
    call = server.stream(status_pb2.WatchStatusRequest())
    next(call)
    trained, told, dropped = server.train(), [], 0
    for update in call:
        dropped += update.dropped
        if update.event.run_id == trained[0].run_id:
            told.append(update.event)
            if update.event.HasField("finished"):
                break
    call.cancel()
    lost = len(trained) - len(told)
    require(told == [e for e in trained if e in told], "events in another order than Train's")
    require(lost <= dropped, f"{lost} events lost, and {dropped} told as lost")


@promise(trains=False)
def a_negative_interval_is_refused(server: Server) -> None:
    """INVALID_ARGUMENT names `min_interval` where it is negative."""
    request = status_pb2.WatchStatusRequest(min_interval=Duration(seconds=-1))
    server.refused(request, INVALID, fields=["min_interval"])


@promise(trains=False)
def bytes_that_are_no_message_are_refused(server: Server) -> None:
    """REQUEST_UNREADABLE: the bytes of the request are no message of its method."""
    for method in METHODS.values():
        path = f"/{method.containing_service.full_name}/{method.name}"
        try:
            answers = list(server.raw(path, [b"\xff\xff\xff"]))
        except grpc.RpcError as error:
            found = refusal_of(error, f"{method.name} of three bytes")
            require_equal((found.code, found.reason), (INVALID, "REQUEST_UNREADABLE"), path)
        else:
            require(False, f"{path} answered {shown(answers)}")


@promise(trains=False)
def unknown_fields_are_passed_over(server: Server) -> None:
    """Clients of a later version may set fields that this one has not: they are passed over."""
    for name in ("GetStatus", "GetServerInfo"):
        answers = list(server.raw(f"/apollo.v1.StatusService/{name}", [UNKNOWN_FIELD]))
        require_equal(len(answers), 1, f"{name} with an unknown field: answers")


@promise(trains=False)
def unknown_methods_are_unimplemented(server: Server) -> None:
    """A method that the server has not is UNIMPLEMENTED."""
    for service in SERVICES:
        try:
            list(server.raw(f"/{service.full_name}/NoSuchMethod", [b""]))
        except grpc.RpcError as error:
            found: object = error.code()
        else:
            found = grpc.StatusCode.OK
        require_equal(found, grpc.StatusCode.UNIMPLEMENTED, f"a method unknown to {service.name}")


@promise(trains=False)
def health_is_told(server: Server) -> None:
    """grpc.health.v1 says SERVING, of the server and of each service."""
    for name in ("", *(service.full_name for service in SERVICES)):
        sent = b"\x0a" + bytes([len(name)]) + name.encode() if name else b""
        (answer,) = _optional(server, "/grpc.health.v1.Health/Check", sent)
        require_equal(answer, HEALTHY, f"health of {name or 'the server'}")


@promise(trains=False)
def reflection_lists_the_services(server: Server) -> None:
    """grpc.reflection lists every service of the contract, so that no proto file is needed."""
    path = "/{}.ServerReflection/ServerReflectionInfo"
    try:
        answers = _optional(server, path.format(REFLECTIONS[0]), LIST_SERVICES)
    except NotApplicableError:
        answers = _optional(server, path.format(REFLECTIONS[1]), LIST_SERVICES)
    missing = [s.full_name for s in SERVICES if s.full_name.encode() not in b"".join(answers)]
    require(not missing, f"not listed: {missing}")


def _optional(server: Server, path: str, request: bytes) -> list[bytes]:
    try:
        return list(server.raw(path, [request]))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise NotApplicableError("the server does not have it") from error
        raise
