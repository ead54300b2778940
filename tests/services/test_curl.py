"""Callers without a proto file: grpcurl and buf curl reach every RPC, over each way in.

The examples are those of docs/reference.md. `python -m tests.services.record_examples` asks again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from apollo_trainer.config import Settings
from apollo_trainer.services.reflection import contract_files
from tests.certificates import Authority
from tests.services.conftest import ServerThread
from tests.services.test_tls import told
from tests.waiting import HANG, wait_until

BIN = Path(sys.executable).parent
EXAMPLES: dict[str, Any] = json.loads(Path("protos/examples.json").read_text())
# They go on until their caller leaves; so many answers are read.
ENDLESS = {"apollo.v1.StatusService.WatchStatus": 1, "apollo.v1.TrainingService.WatchRuns": 1}
METHODS = [
    f"{file.package}.{service.name}.{method.name}"
    for file in contract_files()
    for service in file.service
    for method in service.method
]
REPEATABLE = ("Get", "List", "Watch", "Cancel")
IDS = {"runId": "RUN_ID", "operationId": "OPERATION_ID", "snapshotId": "SNAPSHOT_ID",
       "datasetId": "DATASET_ID"}  # fmt: skip


class Curl:
    """One tool and one way in.

    Args:
        command: the tool with the options of the way.
        place: what comes before `SERVICE/METHOD`.
    """

    def __init__(self, command: Sequence[str], place: Sequence[str], prefix: str = ""):
        self._command, self._place, self._prefix = command, place, prefix

    def call(self, method: str, request: Any) -> list[Any]:
        """The answers of a method, by its full name."""
        service, _, name = method.rpartition(".")
        requests = request if isinstance(request, list) else [request]
        data = "".join(json.dumps(each) for each in requests)
        command = [*self._command, "-d", data, *self._place, f"{self._prefix}{service}/{name}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stderr
            if most := ENDLESS.get(method):
                answers = list(read(process.stdout, most))
                process.kill()
                return answers
            out, error = process.communicate(timeout=HANG)
            assert process.returncode == 0, (method, request, error)
            return values(out.decode())

    def describe(self, name: str) -> str:
        """What the tool tells of a symbol."""
        command = [*self._command, *self._place, "describe", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True)
        return done.stdout


def read(stream: Any, most: int) -> Iterator[Any]:
    """The first JSON values of a stream."""
    text = ""
    while most and (line := stream.readline()):
        text += line.decode()
        if found := values(text):
            yield found[0]
            text, most = "", most - 1


def values(text: str) -> list[Any]:
    """Whole JSON values, one after the other; empty where the last is cut off."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return []
        found.append(value)
        at += len(text[at:]) - len(text[at:].lstrip())
    return found


class Asking:
    """Runs examples in order; ids that answers tell stand for the names of `IDS` in requests."""

    def __init__(self, call: Callable[[str, Any], list[Any]], folder: Path):
        self._call, self._folder = call, folder
        self._known: dict[str, str] = {}

    def answers(self, method: str, request: Any) -> list[Any]:
        """The answers of one RPC."""
        found = self._call(method, self._filled(request))
        self._learn(found)
        return found

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._filled(each) for each in value]
        if isinstance(value, str) and value.startswith("/models/"):
            return str(self._folder / value.removeprefix("/models/"))
        return self._known.get(value, value) if isinstance(value, str) else value

    def _learn(self, value: Any) -> None:
        for each in value if isinstance(value, list) else ():
            self._learn(each)
        for key, each in value.items() if isinstance(value, dict) else ():
            if key in IDS and isinstance(each, str) and each:
                self._known[IDS[key]] = each
            self._learn(each)


def paths(value: Any, at: str = "") -> set[str]:
    """Where values lie in it; all entries of a list at one place. Progress may be told or not."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if key != "progress"}
        return {path for key, each in kept.items() for path in paths(each, f"{at}.{key}")}
    if isinstance(value, list):
        return {path for each in value for path in paths(each, f"{at}[]")}
    return {at}


def socket(address: str) -> dict[str, Curl]:
    path = address.removeprefix("unix:")
    return {
        "grpcurl": Curl([str(BIN / "grpcurl"), "-plaintext", "-unix"], [path]),
        "buf": Curl(
            [str(BIN / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge",
             "--unix-socket", path], [], "http://localhost/",
        ),
    }  # fmt: skip


def tcp(address: str, ca: Path, *, token: str = "", mine: Sequence[Path] = ()) -> dict[str, Curl]:
    """With a token, or with a certificate and its key."""
    header = [f"authorization: Bearer {token}"] if token else []
    names = ("cert", "key")
    certificates = list(zip(names, map(str, mine), strict=False))
    return {
        "grpcurl": Curl(
            [str(BIN / "grpcurl"), "-cacert", str(ca), *(w for h in header for w in ("-H", h)),
             *(w for name, path in certificates for w in (f"-{name}", path))],
            [address],
        ),
        "buf": Curl(
            [str(BIN / "buf"), "curl", "--protocol", "grpc", "--cacert", str(ca),
             *(w for h in header for w in ("-H", h, "--reflect-header", h)),
             *(w for name, path in certificates for w in (f"--{name}", path))],
            [], f"https://{address}/",
        ),
    }  # fmt: skip


Ways = Callable[[str], dict[str, Curl]]
STATUS = "apollo.v1.StatusService.GetStatus"


@pytest.fixture
def ways(
    start_engine: Any,
    state_dir: Path,
    sidecar_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Ways]:
    """Starts a server that is attached to an engine; the tools that reach it over a way."""
    started: list[ServerThread] = []

    def start(way: str) -> dict[str, Curl]:
        start_engine()
        given: dict[str, Any] = {"state_dir": state_dir, "sidecar": sidecar_address, "rank": 8}
        address, ours = f"unix:{state_dir}/training.sock", Authority(tmp_path, "ours")
        if way != "a socket":
            certificate, key = ours.issue("server")
            address, given["tls_certificate"], given["tls_key"] = "127.0.0.1:0", certificate, key
        if way == "a certificate":
            given["tls_client_ca"] = ours.ca
        settings = Settings(address=address, probe_weights=False, **given)
        with caplog.at_level("INFO"):
            serves = (lambda: told(caplog.text)) if way != "a socket" else None
            started.append(ServerThread(settings, monkeypatch, serves=serves))
        tools = tools_of(way, told(caplog.text) or address, ours, state_dir)
        wait_until(lambda: attached(tools["grpcurl"]), "the attachment")
        return tools

    yield start
    for server in started:
        server.stop()


def tools_of(way: str, address: str, ours: Authority, state_dir: Path) -> dict[str, Curl]:
    if way == "a socket":
        return socket(address)
    if way == "a token":
        return tcp(address, ours.ca, token=(state_dir / "token").read_text().strip())
    return tcp(address, ours.ca, mine=ours.issue("client"))


def attached(curl: Curl) -> bool:
    (answer,) = curl.call(STATUS, {})
    return bool(answer["status"]["attachment"] == "ATTACHMENT_STATE_ATTACHED")


def test_the_reference_has_an_example_of_each_rpc() -> None:
    assert set(EXAMPLES) == set(METHODS)


@pytest.mark.parametrize(
    ("way", "tool"),
    [
        ("a socket", "grpcurl"),
        ("a socket", "buf"),
        ("a token", "grpcurl"),
        pytest.param("a certificate", "grpcurl", marks=pytest.mark.long),
        pytest.param("a token", "buf", marks=pytest.mark.long),
        pytest.param("a certificate", "buf", marks=pytest.mark.long),
    ],
)
def test_each_rpc_answers_as_the_reference_says(
    ways: Ways, tmp_path: Path, way: str, tool: str
) -> None:
    asking = Asking(ways(way)[tool].call, tmp_path)
    for method, example in EXAMPLES.items():

        def missing(method: str = method, example: Any = example) -> set[str]:
            return paths(example["answers"]) - paths(asking.answers(method, example["request"]))

        if method.rpartition(".")[2].startswith(REPEATABLE):
            # What another example began may be at work yet.
            wait_until(lambda missing=missing: not missing(), f"the whole answer of {method}")
        else:
            assert not missing(), method


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.long)])
def test_grpcurl_describes_services_methods_and_messages_with_their_comments(
    ways: Ways, every: int
) -> None:
    curl, comments = ways("a socket")["grpcurl"], dict[str, str]()
    for file in contract_files():
        comments |= first_comments(file) if file.package.startswith("apollo") else {}
    for name in [*comments][::every]:
        assert comments[name] in curl.describe(name), name


def first_comments(file: Any) -> dict[str, str]:
    """The first line of each comment, by the full name of what it is about."""
    found = {}
    for location in file.source_code_info.location:
        match list(location.path):
            case [6, number]:
                name = file.service[number].name
            case [6, number, 2, place]:
                service = file.service[number]
                name = f"{service.name}.{service.method[place].name}"
            case [4, number]:
                name = file.message_type[number].name
            case _:
                continue
        if location.leading_comments:
            first = location.leading_comments.strip().splitlines()[0].strip()
            found[f"{file.package}.{name}"] = first
    return found
