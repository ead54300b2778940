"""Clients that mean harm are refused, or cost a bounded part; others are served meanwhile."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import PermissionDenied, Unauthenticated
from apollo_grpc.scopes import Scope
from apollo_grpc.tokens import Token, digest_of
from apollo_grpc.v1 import status_pb2
from tests import http2_frames as h2
from tests import programs
from tests.certificates import Authority
from tests.engine_double import EngineDouble
from tests.waiting import HANG, at_most, wait_until

STATUS, TRAIN = "/apollo.v1.StatusService/GetStatus", "/apollo.v1.TrainingService/Train"
# Within which a call of somebody else is answered, whatever goes on.
CALL_SECONDS = 2.0
# Of the server's memory, by one attack: a message and its copy.
GROWTH_KIB = 192 * 1024
STOP_SECONDS = 8.0
CHUNK = bytes(16384)
SECRETS = {scope: f"a-secret-for-{scope.word}-callers" for scope in Scope}


class Victim:
    """A server of its own process, on a port of 127.0.0.1.

    Args:
        folder: private, with a short path; of its state, its tokens and its log.

    Attributes:
        admin: the header of a caller who may do all.
    """

    def __init__(self, folder: Path, *arguments: str):
        self.folder, self._log = folder, folder / "log"
        self.admin = {"authorization": f"Bearer {SECRETS[Scope.ADMIN]}"}
        tokens = [
            Token(scope.word, scope, digest_of(text)).line() for scope, text in SECRETS.items()
        ]
        (folder / "token").write_text("\n".join(tokens))
        environment = os.environ | {"APOLLO_STATE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        arguments = ("--address", "127.0.0.1:0", *arguments)
        self.process = programs.start(programs.SERVER, *arguments, env=environment, log=self._log)
        wait_until(lambda: "listens on" in self.log(), "the server")
        self.address = re.findall(r"listens on (127\S+)", self.log())[-1]

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def client(self, scope: Scope = Scope.READ, **tls: Any) -> ApolloClient:
        return ApolloClient(self.address, token=SECRETS[scope], **tls)

    def require_serving(self, **tls: Any) -> None:
        """A caller who has only come is answered in time."""
        with self.client(**tls) as client, at_most(CALL_SECONDS):
            client.status()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Others call all the while; its memory grows by little."""
        before, over, failed = self._memory_kib(), threading.Event(), list[BaseException]()

        def call() -> None:
            while not over.wait(0.02):
                try:
                    self.require_serving()
                except BaseException as error:
                    failed.append(error)

        with self.client() as client:
            client.status()
        thread = threading.Thread(target=call)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(HANG)
        assert failed == []
        assert self._memory_kib() - before < GROWTH_KIB
        self.require_serving()

    def _memory_kib(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Victim]]:
    started, folders = list[Victim](), list[str]()

    def begin(*arguments: str) -> Victim:
        folders.append(tempfile.mkdtemp(prefix="apollo-"))
        started.append(Victim(Path(folders[-1]), *arguments))
        return started[-1]

    yield begin
    for victim in started:
        victim.process.kill()
        victim.process.wait(HANG)
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def victim(start: Callable[..., Victim]) -> Victim:
    return start()


def status_of(ended: tuple[int, bytes]) -> int:
    """The status in trailers that no Huffman code hides."""
    found = re.search(rb"grpc-status[\x01\x02](\d+)", ended[1])
    assert found, ended
    return int(found[1])


def pour(connection: h2.Connection, data: bytes) -> int:
    """Sends a message in frames until the other side takes no more; how many bytes it took."""
    sent = 0
    connection.socket.settimeout(1)
    with suppress(OSError):
        for at in range(0, len(data), len(CHUNK)):
            connection.socket.sendall(h2.frame(h2.DATA, 0, 1, data[at : at + len(CHUNK)]))
            sent = at + len(CHUNK)
    connection.socket.settimeout(HANG)
    return sent


REFUSED = 16
EXHAUSTED = 8


def test_a_message_of_4_gib_is_refused_by_its_first_bytes(victim: Victim) -> None:
    with victim.serving(), h2.Connection(victim.address) as line:
        line.socket.sendall(line.head(1, TRAIN, **victim.admin))
        line.socket.sendall(h2.frame(h2.DATA, 0, 1, h2.message(CHUNK[:100], size=2**32 - 1)))
        assert status_of(line.end_of(1)) == EXHAUSTED


@pytest.mark.parametrize("token", ["", "Bearer wrong"])
def test_without_a_token_no_byte_of_4_gib_is_waited_for(victim: Victim, token: str) -> None:
    with victim.serving(), h2.Connection(victim.address) as line:
        line.socket.sendall(line.head(1, TRAIN, authorization=token))
        assert status_of(line.end_of(1)) == REFUSED
        # What comes all the same is thrown away, or ends the connection.
        pour(line, h2.message(bytes(32 * 2**20), size=2**32 - 1))


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A message of 2 MB that unfolds to 2 GiB."""
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = packed.flush(zlib.Z_FULL_FLUSH)
    block = packed.compress(bytes(2**24)) + packed.flush(zlib.Z_FULL_FLUSH)
    return h2.message(start + 128 * block, compressed=True)


@pytest.mark.parametrize("known", [True, False])
def test_a_compression_bomb_is_refused_before_it_has_unfolded(
    victim: Victim, bomb: bytes, known: bool
) -> None:
    with victim.serving(), h2.Connection(victim.address) as line:
        fields = victim.admin if known else {}
        line.socket.sendall(line.head(1, STATUS, grpc_encoding="gzip", **fields))
        assert status_of(line.pour(1, bomb)) == (EXHAUSTED if known else REFUSED)


def test_slow_loris_holds_its_own_connection_alone(victim: Victim) -> None:
    with victim.serving():
        lines = [h2.Connection(victim.address) for _ in range(300)]
        for number, line in enumerate(lines):
            head = line.head(1, STATUS, **victim.admin)
            body = h2.frame(h2.DATA, 0, 1, h2.message(b"", size=1000)[:3])
            half = [head[:7], head[:40], head, head + body, head + body[:11]][number % 5]
            line.socket.sendall(half)
        for _ in range(10):
            victim.require_serving()
    for line in lines:
        line.socket.close()


def test_half_a_body_without_a_token_is_refused_at_once(victim: Victim) -> None:
    with h2.Connection(victim.address) as line, at_most(CALL_SECONDS):
        body = h2.frame(h2.DATA, 0, 1, h2.message(b"", size=1000)[:3])
        line.socket.sendall(line.head(1, TRAIN) + body)
        assert status_of(line.end_of(1)) == REFUSED


def half_open() -> int:
    """10,000, or as many as this system's limit leaves both sides."""
    return min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1000)


def test_half_open_connections_keep_nobody_out(
    victim: Victim, record_property: Callable[[str, object], None]
) -> None:
    record_property("connections", half_open())
    host, _, port = victim.address.rpartition(":")
    opened = list[socket.socket]()
    with victim.serving():
        for _ in range(half_open()):
            opened.append(socket.create_connection((host, int(port)), HANG))
        for _ in range(10):
            victim.require_serving()
    for each in opened:
        each.close()


def test_a_token_of_a_smaller_scope_does_what_it_may_and_no_more(victim: Victim) -> None:
    with victim.client(Scope.READ) as client:
        assert client.status().server_version
        for call in (
            lambda: list(client.train([("a", "b")])),
            lambda: client.export("/nowhere"),
            lambda: client.cancel_run("a"),
        ):
            with pytest.raises(PermissionDenied) as refused:
                call()
            assert refused.value.reason == "SCOPE_MISSING"
    with victim.client(Scope.TRAIN) as client, pytest.raises(PermissionDenied) as refused:
        client.export("/nowhere")
    assert refused.value.metadata == {"scope": "admin"}


def test_10000_guesses_are_refused_and_are_few_lines_of_the_log(victim: Victim) -> None:
    before, ended, together = victim.log().count("without a known token"), list[int](), 100
    with victim.serving(), h2.Connection(victim.address) as line:
        answers = line.frames()
        for first in range(0, 10_000, together):
            streams = range(2 * first + 1, 2 * (first + together), 2)
            line.socket.sendall(
                b"".join(line.head(at, STATUS, authorization=f"Bearer {at}") for at in streams)
            )
            while len(ended) < first + together:
                kind, flags, _, payload = next(answers)
                if kind == h2.HEADERS and flags & h2.END_STREAM:
                    ended.append(status_of((kind, payload)))
    assert set(ended) == {REFUSED}
    assert victim.log().count("without a known token") - before <= 2


def read_all(line: h2.Connection) -> threading.Thread:
    """Reads what comes, until the connection ends."""

    def read() -> None:
        with suppress(OSError):
            for _ in line.frames():
                pass

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@pytest.mark.parametrize("known", [True, False])
def test_streams_that_are_reset_as_soon_as_they_begin_cost_others_nothing(
    victim: Victim, known: bool
) -> None:
    fields = victim.admin if known else {}
    lines = [h2.Connection(victim.address) for _ in range(3)]
    readers = [read_all(line) for line in lines]
    with victim.serving(), suppress(OSError):
        for at in range(1, 10_000, 2):
            for line in lines:
                reset = h2.frame(h2.RST_STREAM, 0, at, h2.CANCEL)
                line.socket.sendall(line.head(at, STATUS, **fields) + reset)
    for line, reader in zip(lines, readers, strict=True):
        line.socket.shutdown(socket.SHUT_RDWR)
        reader.join(HANG)
        line.socket.close()


def test_what_is_no_tls_ends_its_connection_alone(
    start: Callable[..., Victim], tmp_path: Path
) -> None:
    ours = Authority(tmp_path, "ours")
    certificate, key = ours.issue("server")
    victim = start("--tls-certificate", str(certificate), "--tls-key", str(key))
    host, _, port = victim.address.rpartition(":")
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    for garbage in (h2.PREFACE, b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 64, hello + CHUNK):
        with socket.create_connection((host, int(port)), HANG) as line, suppress(ConnectionError):
            line.sendall(garbage)
            while line.recv(65536):
                pass
    # A hand that was never shaken to its end.
    with socket.create_connection((host, int(port)), HANG) as line:
        line.sendall(hello)
        victim.require_serving(ca=ours.ca)
    context = ssl.create_default_context(cafile=str(ours.ca))
    context.set_alpn_protocols(["h2"])
    with h2.Connection(victim.address, context) as line:
        line.socket.sendall(line.head(1, STATUS))
        assert status_of(line.end_of(1)) == REFUSED


def test_sigterm_ends_the_server_in_time_whatever_callers_hold_open(
    start: Callable[..., Victim],
) -> None:
    victim = start()
    watch = "/apollo.v1.StatusService/WatchStatus"
    empty, half = h2.frame(h2.DATA, 1, 1, h2.message(b"")), h2.message(b"", size=1000)[:3]
    lines = [h2.Connection(victim.address) for _ in range(60)]
    for number, line in enumerate(lines):
        sent = [
            # A stream that is never read, and may not even be written to.
            h2.frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
            + line.head(1, watch, **victim.admin)
            + empty,
            line.head(1, watch, **victim.admin) + empty,
            line.head(1, TRAIN, **victim.admin) + h2.frame(h2.DATA, 0, 1, half),
            line.head(1, TRAIN, **victim.admin)[:20],
            b"",
        ][number % 5]
        line.socket.sendall(sent)
    victim.require_serving()
    victim.process.send_signal(signal.SIGTERM)
    with at_most(STOP_SECONDS):
        assert victim.process.wait(HANG) == 0
    for line in lines:
        line.socket.close()


def test_tokens_are_read_again_at_sighup_and_open_streams_go_on(
    start: Callable[..., Victim], model_folder: Path
) -> None:
    victim = start()
    file = victim.folder / "token"
    added = Token("added", Scope.READ, digest_of("added-while-it-serves"))
    kept = Token("train", Scope.TRAIN, digest_of(SECRETS[Scope.TRAIN]))
    with (
        victim.client(Scope.READ) as removed,
        ApolloClient(victim.address, token="added-while-it-serves") as adding,
    ):
        watching = removed.watch()
        next(watching)
        file.write_text(f"{added.line()}\n{kept.line()}\n")
        removed.status()
        victim.process.send_signal(signal.SIGHUP)
        wait_until(lambda: f"2 tokens are in {file}" in victim.log(), "the tokens")
        adding.status()
        with pytest.raises(Unauthenticated):
            removed.status()
        file.write_text("two\nlines")
        victim.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the tokens before it stay" in victim.log(), "the refusal")
        adding.status()
        # What is watched changes, and the stream of a token that is none any more tells it.
        engine = EngineDouble(model_folder, f"unix:{victim.folder}/sidecar.sock")
        try:
            attached = status_pb2.ATTACHMENT_STATE_ATTACHED
            assert any(update.status.attachment == attached for update in watching)
        finally:
            engine.stop()
