"""TLS for real: handshakes with certificates made here, and the ones that must fail."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from apollo_grpc.transport import Endpoint, ServerTls, open_port

SECONDS = 10


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._certificate = self._sign(self._subject, self._key.public_key(), authority=True)
        self.ca = self._write("ca", self._certificate)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files of a holder at 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._write(name, self._sign(subject, key.public_key(), authority=False))
        key_file = certificate.with_suffix(".key")
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, key_file

    def _sign(self, subject: x509.Name, public_key, *, authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder(issuer_name=self._subject, subject_name=subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self._folder / f"{self._name}-{name}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


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

    def start(tls: ServerTls, token: str | None = "token") -> str:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"hello")
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"m": handler})])
        port = free_port()
        open_port(server, f"127.0.0.1:{port}", token=token, tls=tls)
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
    address = serve(ServerTls(*ours.issue("server"), client_ca=ours.ca), token=None)
    certificate, key = ours.issue("client")
    assert call(Endpoint(address, ca=ours.ca, certificate=certificate, key=key)) == b"hello"
    certificate, key = theirs.issue("client")
    assert_refused(Endpoint(address, ca=ours.ca, certificate=certificate, key=key))
    assert_refused(Endpoint(address, ca=ours.ca))
