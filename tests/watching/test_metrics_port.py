"""The port that Prometheus reads: who may read it, and that nobody keeps others from it."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.token_check import TokenCheck
from apollo_grpc.transport import ServerTls
from apollo_trainer.watching.metrics_port import READERS, MetricsPort
from tests.certificates import Authority
from tests.waiting import HANG, wait_until

TOKEN = "of-the-server"


@pytest.fixture
def opened() -> Iterator[Callable[..., MetricsPort]]:
    """Opens the port of a registry with one gauge."""
    ports = list[MetricsPort]()

    def open_port(address: str = "127.0.0.1:0", tls: Any = None, check: Any = None) -> MetricsPort:
        registry = CollectorRegistry()
        Gauge("apollo_test", "A figure.", registry=registry).set(7)
        ports.append(MetricsPort(registry, address, tls, check))
        return ports[-1]

    yield open_port
    for port in ports:
        port.stop()


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


def tls_of(ours: Authority, *, client_ca: Path | None = None) -> ServerTls:
    return ServerTls(*ours.issue("server"), client_ca)


def trusting(ours: Authority, *certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ours.ca)
    if certificate:
        context.load_cert_chain(*certificate)
    return context


def read(address: str, context: ssl.SSLContext | None = None, token: str = "") -> tuple[int, str]:
    """The status and body that the port answers with."""
    host, _, port = address.rpartition(":")
    if context:
        asked: Any = http.client.HTTPSConnection(host, int(port), context=context, timeout=HANG)
    else:
        asked = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=HANG)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        asked.request("GET", "/metrics", headers=headers)
        answer = asked.getresponse()
        return answer.status, answer.read().decode()
    finally:
        asked.close()


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0"])
def test_on_this_machine_it_is_read_without_a_token(opened: Any, address: str) -> None:
    status, body = read(opened(address).address)
    assert status == 200
    assert "apollo_test 7.0" in body


@pytest.mark.parametrize("address", ["0.0.0.0:0", "10.0.0.1:9400", "metrics.example:9400"])
def test_beyond_this_machine_it_is_refused_without_tls(opened: Any, address: str) -> None:
    with pytest.raises(InvalidArgument, match="beyond this machine and needs TLS") as refused:
        opened(address, check=TokenCheck(TOKEN))
    assert refused.value.violations[0].field == "metrics_address"


def test_a_socket_is_no_address_of_metrics(opened: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is a socket"):
        opened(f"unix:{tmp_path}/metrics.sock")


def test_an_address_that_is_taken_is_told(opened: Any) -> None:
    first = opened()
    with pytest.raises(FailedPrecondition, match=r"APOLLO_METRICS_ADDRESS") as refused:
        opened(first.address)
    assert refused.value.reason == "ADDRESS_TAKEN"


def test_with_tls_the_token_of_callers_is_asked_for(opened: Any, ours: Authority) -> None:
    address = opened("0.0.0.0:0", tls_of(ours), TokenCheck(TOKEN)).address
    address, trusted = address.replace("0.0.0.0", "127.0.0.1"), trusting(ours)
    assert read(address, trusted, TOKEN)[0] == 200
    for token in ("", "another"):
        status, body = read(address, trusted, token)
        assert (status, "apollo_test" in body) == (401, False)
    with pytest.raises((OSError, http.client.HTTPException)):
        read(address, token=TOKEN)


def test_with_a_ca_of_clients_a_certificate_is_needed(opened: Any, ours: Authority) -> None:
    address = opened(tls=tls_of(ours, client_ca=ours.ca)).address
    assert read(address, trusting(ours, *ours.issue("prometheus")))[0] == 200
    with pytest.raises((OSError, http.client.HTTPException)):
        read(address, trusting(ours))


@pytest.mark.parametrize("secure", [False, True])
def test_those_who_say_nothing_do_not_keep_others_waiting(
    opened: Any, ours: Authority, secure: bool
) -> None:
    context = trusting(ours) if secure else None
    address = opened(tls=tls_of(ours) if secure else None).address
    host, _, port = address.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(READERS - 1)]
    assert read(address, context)[0] == 200
    # One more than there is room for is turned away; when some have left there is room again.
    silent += [socket.create_connection((host, int(port))) for _ in range(2)]
    for connection in silent:
        connection.close()

    def answered() -> bool:
        try:
            return read(address, context)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    wait_until(answered, "room for a reader")


def test_it_answers_nobody_once_it_is_stopped(opened: Any) -> None:
    port = opened()
    port.stop()
    with pytest.raises(OSError):
        read(port.address)
