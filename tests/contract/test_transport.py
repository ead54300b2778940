"""Which servers may open, which are refused, and where a token may travel."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent import futures

import grpc
import pytest

from apollo_grpc.addresses import is_loopback
from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.transport import SERVER_OPTIONS, Endpoint, ServerTls, lock_socket, open_port
from tests.waiting import HANG

LOOPBACK = ["127.0.0.1:5", "127.8.8.8:5", "localhost:5", "[::1]:5", "dns:///localhost:5"]
BEYOND = [
    "0.0.0.0:5",
    "10.0.0.1:5",
    "[::]:5",
    "example.org:5",
    "localhost.example.org:5",
    "127.0.0.1.example.org:5",
]
# Which a URI's parser may read as another machine's, or as this one's.
NO_ADDRESSES = [
    "dns://8.8.8.8/localhost:5",
    "example.org/127.0.0.1:5",
    "127.0.0.1:5,example.org:5",
    "",
]


def echo_server(reply: bytes = b"hello"):
    server = grpc.server(futures.ThreadPoolExecutor(1), options=SERVER_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)
    rooms = grpc.method_handlers_generic_handler("test.Echo", {"Say": handler})
    server.add_generic_rpc_handlers((rooms,))
    return server


def say(endpoint: Endpoint) -> bytes:
    with endpoint.channel() as channel:
        method = channel.unary_unary("/test.Echo/Say")
        return method(b"", timeout=HANG, wait_for_ready=True, metadata=endpoint.metadata())


@pytest.fixture
def stopping():
    """Servers to stop at the end."""
    servers: list[grpc.Server] = []
    yield servers
    for server in servers:
        server.stop(None).wait()


def test_a_second_server_on_a_socket_is_refused_and_the_first_goes_on(short_folder, stopping):
    address = f"unix:{short_folder}/s.sock"
    stopping.append(first := echo_server(b"first"))
    lock = open_port(first, address)
    first.start()
    with pytest.raises(FailedPrecondition, match="Another server") as refused:
        open_port(echo_server(b"second"), address)
    assert refused.value.reason == "SOCKET_TAKEN"
    assert say(Endpoint(address)) == b"first"
    lock.release()


def test_a_socket_left_by_a_killed_server_is_replaced(short_folder, stopping):
    path = short_folder / "s.sock"
    killed = (
        "import os, socket, sys, pathlib; from apollo_grpc.transport import PortLock;"
        "lock = PortLock(pathlib.Path(sys.argv[1])); s = socket.socket(socket.AF_UNIX);"
        "s.bind(sys.argv[1]); s.listen(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(path)], timeout=HANG).returncode == -9
    assert path.exists()
    stopping.append(server := echo_server())
    lock = open_port(server, f"unix:{path}")
    server.start()
    assert say(Endpoint(f"unix:{path}")) == b"hello"
    lock.release()


def test_a_released_socket_can_be_opened_again(short_folder, stopping):
    address = f"unix:{short_folder}/s.sock"
    first = echo_server(b"first")
    lock = open_port(first, address)
    first.start()
    first.stop(None).wait()
    lock.release()
    stopping.append(second := echo_server(b"second"))
    lock = open_port(second, address)
    second.start()
    assert say(Endpoint(address)) == b"second"
    lock.release()


def test_a_socket_in_a_folder_that_others_can_enter_is_refused(short_folder):
    short_folder.chmod(0o755)
    with pytest.raises(FailedPrecondition) as refused:
        open_port(echo_server(), f"unix:{short_folder}/s.sock")
    assert refused.value.reason == "STATE_FOLDER_NOT_PRIVATE"
    assert list(short_folder.iterdir()) == []


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0"])
def test_tcp_without_a_token_is_refused(address):
    with pytest.raises(InvalidArgument, match="needs a token"):
        open_port(echo_server(), address)


@pytest.mark.parametrize("address", BEYOND)
def test_tcp_beyond_this_machine_without_tls_is_refused(address):
    with pytest.raises(InvalidArgument, match="needs TLS"):
        open_port(echo_server(), address, guarded=True)


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_what_is_no_address_is_not_listened_on(address):
    with pytest.raises(InvalidArgument, match="is no address"):
        open_port(echo_server(), address, guarded=True)


def test_a_tcp_port_that_is_taken_is_refused():
    refusal = pytest.raises(FailedPrecondition)
    with socket.create_server(("127.0.0.1", 0)) as taken, refusal as refused:
        open_port(echo_server(), f"127.0.0.1:{taken.getsockname()[1]}", guarded=True)
    assert refused.value.reason == "ADDRESS_TAKEN"
    assert "Address already in use" in refused.value.message


def test_two_servers_never_share_a_tcp_port(stopping):
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        address = f"127.0.0.1:{chosen.getsockname()[1]}"
    stopping.append(first := echo_server())
    open_port(first, address, guarded=True)
    first.start()
    with pytest.raises(FailedPrecondition) as refused:
        open_port(echo_server(), address, guarded=True)
    assert refused.value.reason == "ADDRESS_TAKEN"


def test_a_tls_file_that_cannot_be_read_is_named(tmp_path):
    tls = ServerTls(tmp_path / "certificate.pem", tmp_path / "key.pem")
    with pytest.raises(FailedPrecondition, match=r"key\.pem") as refused:
        open_port(echo_server(), "127.0.0.1:0", guarded=True, tls=tls)
    assert refused.value.reason == "TLS_FILE_UNREADABLE"


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_token_is_sent_on_this_machine(address):
    assert is_loopback(address)
    assert Endpoint(address, token="t").metadata() == (("authorization", "Bearer t"),)


@pytest.mark.parametrize("address", [*BEYOND, *NO_ADDRESSES])
def test_nothing_leaves_this_machine_without_tls(address, monkeypatch):
    assert not is_loopback(address)
    opened = []
    for module in (grpc, grpc.aio):
        monkeypatch.setattr(module, "secure_channel", lambda *_, **__: opened.append("TLS"))
        monkeypatch.setattr(module, "insecure_channel", lambda *_, **__: opened.append("plain"))
    Endpoint(address, token="t").channel()
    Endpoint(address).aio_channel()
    assert opened == ["TLS", "TLS"]


def test_no_token_is_sent_over_a_unix_socket_or_where_there_is_none():
    assert Endpoint("unix:/s.sock", token="t").metadata() == ()
    assert Endpoint("example.org:5").metadata() == ()


@pytest.mark.parametrize(
    "name", ["a b", "a%20b", "a#b", "a?b", "a\nb", "ü", "a\udcffb", "a:b", "[a]", "a;b", "a=b&c"]
)
def test_a_socket_of_any_name_is_the_one_that_both_ends_mean(short_folder, stopping, name):
    (folder := short_folder / name).mkdir(mode=0o700)
    address = f"unix:{folder}/s.sock"
    stopping.append(server := echo_server())
    port = open_port(server, address)
    server.start()
    assert (folder / "s.sock").is_socket()
    assert say(Endpoint(port.address)) == b"hello"
    port.release()


def test_a_users_file_is_not_taken_for_an_old_socket(short_folder):
    file = short_folder / "thesis.txt"
    file.write_text("years of work")
    with pytest.raises(FailedPrecondition, match="is no socket"):
        open_port(echo_server(), f"unix:{file}")
    assert file.read_text() == "years of work"


def test_the_port_that_the_system_picked_is_told(stopping):
    stopping.append(server := echo_server())
    port = open_port(server, "127.0.0.1:0", guarded=True)
    server.start()
    assert not port.address.endswith(":0")
    assert say(Endpoint(port.address, token="t")) == b"hello"


def test_a_token_is_not_shown_where_an_endpoint_is_printed():
    assert "secret" not in repr(Endpoint("localhost:1", token="secret"))


@pytest.mark.parametrize("token", ["a\nb", "\x00", "ü", "x" * 5000])
def test_a_token_that_is_no_header_is_refused_before_a_call(token):
    with pytest.raises(InvalidArgument, match="is no token"):
        Endpoint("localhost:1", token=token).metadata()


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        ({"certificate": "c", "ca": "a"}, "key"),
        ({"key": "k", "ca": "a"}, "certificate"),
        ({"certificate": "c"}, "key"),
    ],
)
def test_half_of_tls_is_refused(files, lacking):
    with pytest.raises(InvalidArgument, match=f"{lacking}: is missing"):
        Endpoint("example.org:5", **files)


def test_messages_above_the_usual_4_mib_pass(short_folder, stopping):
    address = f"unix:{short_folder}/s.sock"
    stopping.append(server := echo_server(b"x" * (16 * 2**20)))
    lock = open_port(server, address)
    server.start()
    assert len(say(Endpoint(address))) == 16 * 2**20
    lock.release()


def test_a_proxy_of_the_environment_gets_none_of_the_traffic(monkeypatch, stopping):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        stopping.append(server := echo_server())
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        assert say(Endpoint(f"localhost:{port}", token="t")) == b"hello"


def test_a_server_that_is_gone_is_unavailable(short_folder):
    endpoint = Endpoint(f"unix:{short_folder}/nobody.sock")
    with endpoint.channel() as channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary("/test.Echo/Say")(b"", timeout=HANG)
    assert from_rpc_error(failed.value).code is grpc.StatusCode.UNAVAILABLE


def test_who_finds_the_socket_taken_reads_whose_it_is(short_folder):
    lock = lock_socket(short_folder / "s.sock", "the first engine, with a long name")
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as refused:
            lock_socket(short_folder / "s.sock", "the second")
        assert refused.value.metadata["owner"] == "the first engine, with a long name"
    lock.release()
    lock = lock_socket(short_folder / "s.sock", "the second")
    with pytest.raises(FailedPrecondition) as refused:
        lock_socket(short_folder / "s.sock", "the first")
    assert refused.value.metadata["owner"] == "the second"
    lock.release()


HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("greeting", [b"", HTTP2[:10], HTTP2])
def test_a_peer_that_never_answers_is_let_go(stopping, greeting):
    """As one is whose machine lost its power: its connection would stay open for ever."""
    sooner = {"grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"}
    sooner |= {"grpc.server_handshake_timeout_ms"}
    options = [(n, int(v) // 100 if n in sooner else v) for n, v in SERVER_OPTIONS]
    server = grpc.server(futures.ThreadPoolExecutor(1), options=options)
    stopping.append(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as peer:
        # HTTP/2's greeting and empty settings, or less, and then silence.
        peer.sendall(greeting)
        while peer.recv(4096):
            pass
