"""Where vLLM listens: URLs that a client takes, and addresses that others have."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_client.command.http_address import answers, url, why_not_free
from apollo_client.command.up import vllm_child
from tests.command_line import apollo


@pytest.fixture
def busy() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/v1"),
        ("::1", "http://[::1]:80/v1"),
        ("0.0.0.0", "http://127.0.0.1:80/v1"),
        ("::", "http://[::1]:80/v1"),
        ("localhost", "http://localhost:80/v1"),
        ("", "http://127.0.0.1:80/v1"),
    ],
)
def test_a_url_is_one_that_can_be_opened(host: str, expected: str) -> None:
    assert url(host, 80) == expected


def test_tls_and_a_socket_of_vllms_are_told_as_they_are() -> None:
    def child(*arguments: str):
        return vllm_child(Path("/m"), "::1", 80, list(arguments), "unix:/s")

    assert child("--ssl-certfile", "c").url == "https://[::1]:80/v1"
    assert child("--uds=/run/v.sock").listens is None


def test_a_busy_port_is_told_before_anything_starts(tmp_path, tiny_model, busy: int) -> None:
    environment = {"APOLLO_STATE_DIR": str(tmp_path / "state")}
    done = apollo("up", str(tiny_model), "--port", str(busy), env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Port {busy} is in use on 127.0.0.1" in done.stderr and "--port" in done.stderr
    assert "Nothing was started" in done.stderr


def test_a_host_of_another_machine_is_told_and_a_free_port_is_free(busy: int) -> None:
    assert "192.0.2.7 is no address of this machine" in why_not_free("192.0.2.7", 80)
    assert "no.such.host.invalid is no address" in why_not_free("no.such.host.invalid", 80)
    assert "in use" in why_not_free("0.0.0.0", busy)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert why_not_free("127.0.0.1", port) == ""


@pytest.mark.parametrize("kind", ["training.sock", "sidecar.sock", "a port"])
def test_a_server_that_runs_already_is_told_before_anything_starts(
    tmp_path, tiny_model, busy: int, kind: str
) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    environment = {"APOLLO_STATE_DIR": str(state)}
    with socket.socket(socket.AF_UNIX) as other:
        if kind == "a port":
            environment["APOLLO_ADDRESS"] = f"127.0.0.1:{busy}"
        else:
            other.bind(str(state / kind))
            other.listen()
        done = apollo("up", str(tiny_model), "--port", str(free_port()), env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "runs already at" in done.stderr and "APOLLO_STATE_DIR" in done.stderr


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_socket_whose_server_has_gone_is_nobody(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    assert path.exists() and not answers(f"unix:{path}")
    assert not answers("127.0.0.1:99999") and not answers("nothing")
