"""TLS for real: handshakes with certificates made here, and the ones that must fail."""

from __future__ import annotations

import socket
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from apollo_grpc.certificates import SYSTEM, roots
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.transport import Endpoint, ServerTls, open_port
from tests.certificates import Authority

SECONDS = 10


@pytest.fixture
def ours(tmp_path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path) -> Authority:
    return Authority(tmp_path, "theirs")


@pytest.fixture
def serve():
    """Serves one method behind TLS; returns the address."""
    servers = []

    def start(tls: ServerTls, guarded: bool = True) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"hello")
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"m": handler})])
        port = free_port()
        open_port(server, f"127.0.0.1:{port}", guarded=guarded, tls=tls)
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(endpoint: Endpoint) -> bytes:
    with endpoint.channel() as channel:
        return channel.unary_unary("/s/m")(b"", timeout=SECONDS, wait_for_ready=False)


def assert_refused(endpoint: Endpoint) -> None:
    with pytest.raises(grpc.RpcError) as error:
        call(endpoint)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_client_that_knows_the_authority_gets_through(ours, serve):
    address = serve(ServerTls(*ours.issue("server")))
    assert call(Endpoint(address, ca=ours.ca)) == b"hello"


def test_a_server_of_another_authority_is_not_trusted(ours, theirs, serve):
    address = serve(ServerTls(*theirs.issue("server")))
    assert_refused(Endpoint(address, ca=ours.ca))


def test_plaintext_does_not_reach_a_server_with_tls(ours, serve):
    assert_refused(Endpoint(serve(ServerTls(*ours.issue("server")))))


def test_mutual_tls_lets_in_its_own_clients_only(ours, theirs, serve):
    # Client certificates say who calls, so that no token is needed.
    address = serve(ServerTls(*ours.issue("server"), client_ca=ours.ca), guarded=False)
    certificate, key = ours.issue("client")
    assert call(Endpoint(address, ca=ours.ca, certificate=certificate, key=key)) == b"hello"
    certificate, key = theirs.issue("client")
    assert_refused(Endpoint(address, ca=ours.ca, certificate=certificate, key=key))
    assert_refused(Endpoint(address, ca=ours.ca))


def test_an_expired_certificate_is_refused_of_a_client_and_of_a_server(ours, serve):
    mutual = ServerTls(*ours.issue("server"), client_ca=ours.ca)
    address = serve(mutual, guarded=False)
    certificate, key = ours.issue("client", expired=True)
    assert_refused(Endpoint(address, ca=ours.ca, certificate=certificate, key=key))
    assert_refused(Endpoint(serve(ServerTls(*ours.issue("old-server", expired=True))), ca=ours.ca))


def test_the_authorities_of_the_system_are_trusted_where_asked_for(ours, serve, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.ca))
    address = serve(ServerTls(*ours.issue("server")))
    assert call(Endpoint(address, ca=SYSTEM)) == b"hello"
    certificate, key = ours.issue("client")
    assert call(Endpoint(address, certificate=certificate, key=key)) == b"hello"


def test_this_systems_own_authorities_are_found(monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    assert b"BEGIN CERTIFICATE" in roots(SYSTEM)


def wrong_files(folder: Path, ours: Authority, theirs: Authority) -> dict[str, ServerTls]:
    certificate, key = ours.issue("server")
    (noise := folder / "noise.pem").write_text("no certificate")
    (empty := folder / "empty.pem").touch()
    return {
        "key of another": ServerTls(certificate, theirs.issue("server")[1]),
        "no PEM": ServerTls(noise, key),
        "empty": ServerTls(certificate, empty),
        "folder": ServerTls(folder, key),
        "endless": ServerTls(Path("/dev/zero"), key),
        "no CA": ServerTls(certificate, key, noise),
        "empty CA": ServerTls(certificate, key, empty),
    }


@pytest.mark.parametrize(
    "wrong", ["key of another", "no PEM", "empty", "folder", "endless", "no CA", "empty CA"]
)
def test_files_that_are_no_tls_are_told_by_name(tmp_path, ours, theirs, wrong):
    tls = wrong_files(tmp_path, ours, theirs)[wrong]
    with pytest.raises(FailedPrecondition) as refused:
        tls.credentials()
    assert refused.value.reason == "TLS_FILE_UNREADABLE"
    assert any(str(f) in refused.value.message for f in (tls.certificate, tls.key, tls.client_ca))


def test_an_encrypted_key_is_refused_and_asks_nobody(tmp_path, ours):
    certificate, key = ours.issue("server", password=b"secret")
    with pytest.raises(FailedPrecondition, match="unencrypted key"):
        ServerTls(certificate, key).credentials()
