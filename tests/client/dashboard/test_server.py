"""Who is shown the page, and what it is told: whoever was given its address, on this machine."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from apollo_client import ApolloClient
from apollo_client.dashboard import Dashboard
from apollo_grpc.errors import InvalidArgument
from tests.command_line import apollo
from tests.waiting import HANG


@pytest.fixture(scope="module")
def dashboard(server: str) -> Iterator[Dashboard]:
    with ApolloClient(server) as client, Dashboard(client) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def asked(dashboard: Dashboard, path: str, method: str = "GET", **headers: str) -> Any:
    """The answer to one request, its body read."""
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.server_port, timeout=HANG)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    answer.body = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


def told(dashboard: Dashboard) -> Iterator[tuple[str, Any]]:
    """Kinds and values of what the page is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.server_port, timeout=HANG)
    connection.request("GET", f"/{dashboard.token}/events")
    answer = connection.getresponse()
    assert answer.getheader("Content-Type") == "text/event-stream"
    while line := answer.readline():
        data = answer.readline()
        assert answer.readline() == b"\n"
        yield line.decode()[7:-1], json.loads(data[6:])


FILES = ["", "index.html", "style.css", "page.js", "tables.js", "chart.js", "icon.svg"]


@pytest.mark.parametrize("name", FILES)
def test_each_file_may_ask_this_server_alone(dashboard: Dashboard, name: str) -> None:
    answer = asked(dashboard, f"/{dashboard.token}/{name}")
    assert answer.status == 200 and answer.body
    policy = answer.getheader("Content-Security-Policy")
    assert policy.startswith("default-src 'self';") and "frame-ancestors 'none'" in policy
    assert answer.getheader("Referrer-Policy") == "no-referrer"
    assert answer.getheader("Access-Control-Allow-Origin") is None
    assert b"http" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"")


@pytest.mark.parametrize(
    "path", ["/", "/events", "/index.html", "//events", "/{short}/", "/{other}/events", "/%00/x"]
)
def test_without_the_token_nothing_is_shown(dashboard: Dashboard, path: str) -> None:
    token = dashboard.token
    path = path.format(short=token[:-1], other=token[:-1] + ("a" if token[-1] != "a" else "b"))
    assert asked(dashboard, path).status == 404


@pytest.mark.parametrize(
    "name", ["../server.py", "%2e%2e/server.py", "page.py", "/etc/passwd", "a"]
)
def test_no_other_file_is_shown(dashboard: Dashboard, name: str) -> None:
    assert asked(dashboard, f"/{dashboard.token}/{name}").status == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.1@evil.example:80", 421),
        ("[::1", 421),
        ("", 421),
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
    ],
)
def test_a_strangers_name_that_leads_here_is_refused(
    dashboard: Dashboard, host: str, status: int
) -> None:
    for name in ("", "style.css"):
        assert asked(dashboard, f"/{dashboard.token}/{name}", Host=host).status == status
    if status != 200:
        assert asked(dashboard, f"/{dashboard.token}/events", Host=host).status == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(dashboard: Dashboard, method: str) -> None:
    assert asked(dashboard, f"/{dashboard.token}/", method).status == 501


def test_it_listens_on_loopback_and_its_tokens_are_its_own(dashboard: Dashboard) -> None:
    assert dashboard.server_address[0] == "127.0.0.1"
    assert urlsplit(dashboard.url).path == f"/{dashboard.token}/"
    with Dashboard(dashboard.client) as other:
        assert len(other.token) >= 32 and other.token != dashboard.token


def test_the_page_is_told_what_is_known_and_then_what_happens(dashboard: Dashboard) -> None:
    client = dashboard.client
    *_, before = client.train([("a", "b")], epochs=3, min_loss=0.0)
    stream = told(dashboard)
    assert next(stream) == ("begin", {})
    kinds, steps = set(), list[int]()
    while "snapshots" not in kinds:
        kind, value = next(stream)
        kinds.add(kind)
        if kind == "event" and value["run_id"] == before.run_id and "step" in value:
            steps.append(int(value["step"]["step"]))
    assert steps == [1, 2, 3] and {"run", "event", "status"} <= kinds
    *_, after = client.train([("a", "b")], epochs=4, min_loss=0.0)
    found = list[Any]()
    while not found or "finished" not in found[-1]:
        kind, value = next(stream)
        if kind in ("run", "event") and value["run_id"] == after.run_id:
            found.append(value)
    assert [int(v["step"]["step"]) for v in found if "step" in v] == [1, 2, 3, 4]
    assert [v["state"] for v in found if "state" in v][-1] == "RUN_STATE_SUCCEEDED"
    # What a run learns is not for the page.
    assert not any("spec" in value or "sample_losses" in value.get("step", {}) for value in found)


def test_a_training_server_that_is_gone_is_told_to_the_page(state_dir: Any) -> None:
    with ApolloClient(f"unix:{state_dir}/none.sock") as client, Dashboard(client) as dashboard:
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        (kind, _), (trouble, value) = told(dashboard)
        dashboard.shutdown()
    assert (kind, trouble, value["reason"]) == ("begin", "trouble", "SERVER_UNREACHABLE")


def test_a_port_that_is_taken_is_told(server: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, ApolloClient(server) as client:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=f"--port: {port} cannot be listened on"):
            Dashboard(client, port)
        done = apollo("--address", server, "dashboard", "--port", str(port))
    assert done.returncode == 2 and "--port" in done.stderr


def test_without_a_server_the_command_says_what_to_start(state_dir: Any) -> None:
    done = apollo("dashboard", env={"APOLLO_STATE_DIR": str(state_dir)})
    assert done.returncode == 3 and "apollo up MODEL" in done.stderr


def test_the_command_says_where_the_page_is_and_ctrl_c_ends_it(server: str) -> None:
    command = [sys.executable, "-m", "apollo_client.command", "--address", server, "dashboard"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = urlsplit(process.stdout.readline().split()[1])
        connection = http.client.HTTPConnection("127.0.0.1", url.port or 0, timeout=HANG)
        connection.request("GET", f"{url.path}events")
        assert connection.getresponse().readline() == b"event: begin\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 0
