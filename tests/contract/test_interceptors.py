"""What callers of real servers see when a handler fails, blocking and asyncio alike."""

from __future__ import annotations

import asyncio
import threading
from concurrent import futures
from contextlib import asynccontextmanager, contextmanager

import grpc
import grpc.aio
import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

import apollo_grpc.interceptors as interceptors_module
from apollo_grpc.errors import (
    ApolloError,
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
)
from apollo_grpc.interceptors import AioErrors, SyncErrors
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.token_check import TokenCheck
from tests.waiting import HANG

SECRET = "/var/lib/private/weights.bin"
BAD_FIELDS = InvalidArgument(
    "two fields are wrong",
    reason="SPEC_INVALID",
    metadata={"limit": "7"},
    violations=[FieldViolation("spec.a", "is empty"), FieldViolation("spec.b", "is above 7")],
)
RAISED = {
    b"domain": lambda: BAD_FIELDS,
    b"bug": lambda: ValueError(f"cannot open {SECRET}"),
    b"lookup": lambda: KeyError(SECRET),
    b"long": lambda: NotFound("nothing is called " + "x" * 100_000, reason="RUN_UNKNOWN"),
    b"many": lambda: InvalidArgument(
        "all are wrong",
        violations=[FieldViolation(f"spec.samples[{i}]", "is empty") for i in range(5000)],
    ),
}


def answer(request: bytes) -> bytes:
    if request in RAISED:
        raise RAISED[request]()
    return request


def handlers(unary, stream, read=None, write=None):
    return grpc.method_handlers_generic_handler(
        "test.Echo",
        {
            "Unary": grpc.unary_unary_rpc_method_handler(unary, read, write),
            "Stream": grpc.unary_stream_rpc_method_handler(stream, read, write),
            "Many": grpc.stream_unary_rpc_method_handler(aio_many, read, write),
        },
    )


def sync_stream(request, context):
    yield b"first"
    yield answer(request)


async def aio_unary(request, context):
    return answer(request)


async def aio_many(requests, context):
    return b" ".join([answer(request) async for request in requests])


async def aio_stream(request, context):
    yield b"first"
    yield answer(request)


async def aio_writing_stream(request, context):
    await context.write(b"first")
    await context.write(answer(request))


@contextmanager
def threaded(address):
    server = grpc.server(futures.ThreadPoolExecutor(2), interceptors=[SyncErrors()])
    server.add_generic_rpc_handlers((handlers(lambda r, _: answer(r), sync_stream),))
    server.add_insecure_port(address)
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


@asynccontextmanager
async def asyncio_server(
    address, *, stream=aio_stream, check=None, health=None, read=None, write=None, **bounds
):
    server = grpc.aio.server(interceptors=[AioErrors(check, **bounds)])
    server.add_generic_rpc_handlers((handlers(aio_unary, stream, read, write),))
    if health:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def call(address, method, request, metadata=()):
    """All answers of a blocking call, and the domain error that ended it."""
    with grpc.insecure_channel(address) as channel:
        answers: list[bytes] = []
        try:
            if method == "Unary":
                answers = [channel.unary_unary("/test.Echo/Unary")(request, 20, metadata)]
            else:
                answers += channel.unary_stream("/test.Echo/Stream")(request, 20, metadata)
        except grpc.RpcError as error:
            return answers, from_rpc_error(error)
    return answers, None


async def ask(kind, address, method, request):
    """The same against a threaded or an asyncio server."""
    if kind == "threaded":
        with threaded(address):
            return await asyncio.to_thread(call, address, method, request)
    stream = aio_writing_stream if kind == "asyncio, writing" else aio_stream
    async with asyncio_server(address, stream=stream):
        return await asyncio.to_thread(call, address, method, request)


KINDS = pytest.mark.parametrize("kind", ["threaded", "asyncio", "asyncio, writing"])
METHODS = pytest.mark.parametrize("method", ["Unary", "Stream"])


@KINDS
@METHODS
async def test_a_domain_error_comes_back_as_itself(short_folder, kind, method):
    _, error = await ask(kind, f"unix:{short_folder}/s", method, b"domain")
    assert type(error) is InvalidArgument
    assert (error.message, error.reason) == (BAD_FIELDS.message, BAD_FIELDS.reason)
    assert (error.metadata, error.violations) == (BAD_FIELDS.metadata, BAD_FIELDS.violations)


@KINDS
@METHODS
@pytest.mark.parametrize("request_", [b"bug", b"lookup"])
async def test_an_uncaught_exception_leaks_neither_text_nor_path(
    short_folder, caplog, kind, method, request_
):
    _, error = await ask(kind, f"unix:{short_folder}/s", method, request_)
    assert isinstance(error, ApolloError)
    assert error.code is grpc.StatusCode.INTERNAL
    for leak in (SECRET, "ValueError", "KeyError", "Traceback", ".py", "cannot open"):
        assert leak not in error.message + str(error.metadata)
    # Whoever reads the server's log finds the entry by the id that the caller was given.
    entry = next(r for r in caplog.records if error.metadata["incident"] in r.getMessage())
    assert SECRET in str(entry.exc_info[1])


@KINDS
@METHODS
async def test_answers_pass_unchanged(short_folder, kind, method):
    answers, error = await ask(kind, f"unix:{short_folder}/s", method, b"hello")
    assert error is None
    assert answers == [b"hello"] if method == "Unary" else [b"first", b"hello"]


@KINDS
async def test_a_stream_delivers_what_it_had_before_it_failed(short_folder, kind):
    answers, error = await ask(kind, f"unix:{short_folder}/s", "Stream", b"domain")
    assert answers == [b"first"]
    assert error.reason == "SPEC_INVALID"


@KINDS
@pytest.mark.parametrize(
    ("request_", "reason"), [(b"long", "RUN_UNKNOWN"), (b"many", "INVALID_ARGUMENT")]
)
async def test_an_error_too_long_for_a_header_keeps_its_code_and_reason(
    short_folder, kind, request_, reason
):
    _, error = await ask(kind, f"unix:{short_folder}/s", "Unary", request_)
    assert error.reason == reason
    assert error.message.startswith(("nothing is called xxx", "all are wrong"))


async def test_a_watcher_of_the_standard_health_service_gets_the_status(short_folder):
    health, address = HealthServicer(), f"unix:{short_folder}/s"
    await health.set("apollo", health_pb2.HealthCheckResponse.SERVING)
    async with asyncio_server(address, health=health), grpc.aio.insecure_channel(address) as line:
        request = health_pb2.HealthCheckRequest(service="apollo")
        watch = health_pb2_grpc.HealthStub(line).Watch(request, timeout=HANG)
        first = await watch.read()
        assert first.status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


@METHODS
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", "the-token"),),
        (("authorization", ""),),
    ],
)
async def test_tcp_callers_without_the_token_are_refused(method, metadata):
    async with asyncio_server("127.0.0.1:0", check=TokenCheck("the-token")) as port:
        address = f"127.0.0.1:{port}"
        answers, error = await asyncio.to_thread(call, address, method, b"hello", metadata)
    assert (answers, type(error)) == ([], Unauthenticated)
    assert "the-token" not in error.message


@METHODS
async def test_tcp_callers_with_the_token_go_on(method):
    metadata = (("authorization", "Bearer the-token"),)
    async with asyncio_server("127.0.0.1:0", check=TokenCheck("the-token")) as port:
        address = f"127.0.0.1:{port}"
        answers, error = await asyncio.to_thread(call, address, method, b"hello", metadata)
    assert (answers[-1], error) == (b"hello", None)


@pytest.mark.parametrize("token", [None, ""])
async def test_a_server_without_a_token_refuses_every_tcp_caller(token):
    async with asyncio_server("127.0.0.1:0", check=TokenCheck(token)) as port:
        for metadata in ((), (("authorization", "Bearer "),), (("authorization", "Bearer None"),)):
            address = f"127.0.0.1:{port}"
            _, error = await asyncio.to_thread(call, address, "Unary", b"hello", metadata)
            assert type(error) is Unauthenticated


async def test_unix_callers_need_no_token(short_folder):
    address = f"unix:{short_folder}/s"
    async with asyncio_server(address, check=TokenCheck("the-token")):
        answers, error = await asyncio.to_thread(call, address, "Unary", b"hello")
    assert (answers, error) == ([b"hello"], None)


@METHODS
async def test_a_message_is_not_read_before_the_token_is_looked_at(method):
    read: list[int] = []

    def remember(data):
        read.append(len(data))
        return data

    check = TokenCheck("the-token")
    async with asyncio_server("127.0.0.1:0", check=check, read=remember) as port:
        address, large = f"127.0.0.1:{port}", b"x" * 3_000_000
        _, refused = await asyncio.to_thread(call, address, method, large)
        assert (type(refused), read) == (Unauthenticated, [])
        metadata = (("authorization", "Bearer the-token"),)
        answers, _ = await asyncio.to_thread(call, address, method, large, metadata)
    assert (answers[-1], read) == (large, [3_000_000])


@METHODS
async def test_calls_above_the_limit_are_refused_unread_and_one_that_ends_makes_room(
    short_folder, method
):
    read: list[bytes] = []
    is_open = [True]

    @contextmanager
    def limit(context):
        if is_open[0]:
            raise ResourceExhausted("full", reason="TOO_MANY", retry_seconds=2.5)
        is_open[0] = True
        yield
        is_open[0] = False

    address = f"unix:{short_folder}/s"
    async with asyncio_server(address, limit=limit, read=lambda data: read.append(data) or data):
        _, refused = await asyncio.to_thread(call, address, method, b"hello")
        assert (refused.reason, refused.retry_seconds, read) == ("TOO_MANY", 2.5, [])
        is_open[0] = False
        for _ in range(2):
            answers, _ = await asyncio.to_thread(call, address, method, b"hello")
            assert answers[-1] == b"hello"
    assert not is_open[0]


async def test_a_large_message_is_read_in_its_turn_and_the_turn_ends_with_the_first_answer(
    short_folder,
):
    read, may_answer, may_end = asyncio.Queue(), asyncio.Event(), asyncio.Event()

    async def stream(request, context):
        read.put_nowait(request)
        await may_answer.wait()
        yield b"first"
        await may_end.wait()

    address, turns = f"unix:{short_folder}/s", {"/test.Echo/Stream": asyncio.Semaphore(1)}
    server = asyncio_server(address, stream=stream, turns=turns)
    async with server, grpc.aio.insecure_channel(address) as line:
        calls = [
            line.unary_stream("/test.Echo/Stream")(each, timeout=HANG) for each in (b"a", b"b")
        ]
        first = await read.get()
        # Another method needs no turn, and by its answer the second call has long arrived.
        assert await line.unary_unary("/test.Echo/Unary")(b"c", timeout=HANG) == b"c"
        assert read.empty()
        may_answer.set()
        assert {first, await read.get()} == {b"a", b"b"}
        may_end.set()
        for each in calls:
            assert await each.read() == b"first"
            assert await each.read() is grpc.aio.EOF


async def test_a_turn_is_given_back_by_a_call_that_fails_and_by_a_caller_who_leaves(short_folder):
    begun = asyncio.Queue()

    async def stream(request, context):
        begun.put_nowait(request)
        if request == b"wait":
            await asyncio.sleep(60)
        yield answer(request)

    address, turns = f"unix:{short_folder}/s", {"/test.Echo/Stream": asyncio.Semaphore(1)}
    server = asyncio_server(address, stream=stream, turns=turns)
    async with server, grpc.aio.insecure_channel(address) as line:
        _, error = await asyncio.to_thread(call, address, "Stream", b"domain")
        assert error.reason == "SPEC_INVALID"
        leaving = line.unary_stream("/test.Echo/Stream")(b"wait", timeout=HANG)
        assert [await begun.get(), await begun.get()] == [b"domain", b"wait"]
        leaving.cancel()
        answers, _ = await asyncio.to_thread(call, address, "Stream", b"hello")
        assert answers == [b"hello"]


async def test_a_request_that_does_not_arrive_in_time_is_refused(short_folder, monkeypatch):
    monkeypatch.setattr(interceptors_module, "READ_SECONDS", 0.05)
    address, never = f"unix:{short_folder}/s", threading.Event()

    def requests():
        never.wait(HANG)
        yield b"late"

    def ask():
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream("/test.Echo/Unary")(requests(), timeout=HANG))
        never.set()
        return from_rpc_error(caught.value)

    async with asyncio_server(address):
        error = await asyncio.to_thread(ask)
        assert (type(error), error.reason) == (DeadlineExceeded, "REQUEST_TOO_SLOW")
        answers, _ = await asyncio.to_thread(call, address, "Unary", b"hello")
    assert answers == [b"hello"]


async def test_each_message_of_a_stream_has_its_time(short_folder, monkeypatch):
    monkeypatch.setattr(interceptors_module, "READ_SECONDS", 0.05)
    address, never = f"unix:{short_folder}/s", threading.Event()

    async def many(requests, context):
        return b"".join([each async for each in requests])

    def requests():
        yield b"in time"
        never.wait(HANG)

    def ask(sent):
        with grpc.insecure_channel(address) as channel:
            return channel.stream_unary("/test.Many/Take")(sent, timeout=HANG)

    server = grpc.aio.server(interceptors=[AioErrors()])
    handler = grpc.stream_unary_rpc_method_handler(many)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test.Many", {"Take": handler})]
    )
    server.add_insecure_port(address)
    await server.start()
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(ask, requests())
    never.set()
    assert from_rpc_error(caught.value).reason == "REQUEST_TOO_SLOW"
    assert await asyncio.to_thread(ask, iter([b"a", b"b"])) == b"ab"
    await server.stop(None)


async def test_a_call_without_a_message_is_refused(short_folder):
    address = f"unix:{short_folder}/s"

    def ask():
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream("/test.Echo/Unary")(iter(()), timeout=HANG))
        return from_rpc_error(caught.value)

    async with asyncio_server(address):
        error = await asyncio.to_thread(ask)
    assert (type(error), error.reason) == (InvalidArgument, "REQUEST_UNREADABLE")


@METHODS
async def test_an_answer_that_is_bytes_already_is_sent_as_it_is(short_folder, method):
    address = f"unix:{short_folder}/s"

    def write(answer):
        raise AssertionError("was serialized once more")

    async with asyncio_server(address, write=write):
        answers, error = await asyncio.to_thread(call, address, method, b"hello")
    assert (answers[-1], error) == (b"hello", None)


async def test_a_method_of_many_messages_answers_once_or_refuses_any_of_them(short_folder):
    def read(data):
        if data == b"wrong":
            raise DecodeError("not a message")
        return data

    def ask(*messages):
        with grpc.insecure_channel(address) as channel:
            try:
                return channel.stream_unary("/test.Echo/Many")(iter(messages), timeout=HANG)
            except grpc.RpcError as error:
                return from_rpc_error(error).reason

    address = f"unix:{short_folder}/s"
    async with asyncio_server(address, read=read):
        assert await asyncio.to_thread(ask, b"a", b"b", b"c") == b"a b c"
        assert await asyncio.to_thread(ask) == b""
        assert await asyncio.to_thread(ask, b"a", b"domain", b"c") == "SPEC_INVALID"
        assert await asyncio.to_thread(ask, b"a", b"wrong") == "REQUEST_UNREADABLE"
