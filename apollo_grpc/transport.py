"""The one way to open a channel or a server port: address, TLS, token, limits, keepalive.

Unix sockets lie in a private folder and are guarded by a lock file. TCP is plaintext on loopback
only and always asks for a token; beyond loopback it also needs TLS.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.locations import private_folder, socket_path

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
Option = tuple[str, int | str]

CHANNEL_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 30_000),
    # A proxy from the environment would get the traffic of a local socket.
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Otherwise a second server shares the port silently and takes every other call.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A peer that lost its power or its network never says so, and would hold its streams for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Of the connection itself, which is what ends it in grpc 1.71 and later.
    ("grpc.http2.ping_timeout_ms", 20_000),
    # Otherwise a stream without news is asked twice and then never again.
    ("grpc.http2.max_pings_without_data", 0),
    # Of a connection that was opened and says nothing.
    ("grpc.server_handshake_timeout_ms", 20_000),
)


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a server: its certificate chain, its key, and, for mTLS, its clients' CA."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Reads the files. Raises FailedPrecondition where one cannot be read."""
        ca = _read(self.client_ca) if self.client_ca else None
        return grpc.ssl_server_credentials(
            [(_read(self.key), _read(self.certificate))],
            root_certificates=ca,
            require_client_auth=ca is not None,
        )


@dataclass(frozen=True)
class Endpoint:
    """How a client reaches a server: address, and for TCP a token and, beyond loopback, TLS."""

    address: str
    token: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def _tls(self) -> grpc.ChannelCredentials | None:
        if self.ca is None:
            return None
        key = _read(self.key) if self.key else None
        chain = _read(self.certificate) if self.certificate else None
        return grpc.ssl_channel_credentials(_read(self.ca), key, chain)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Call metadata that carries the token. Raises InvalidArgument before it would leak."""
        if not self.token or socket_path(self.address):
            return ()
        if self.ca is None and not is_loopback(self.address):
            raise InvalidArgument.at(
                "address", f"{self.address} is not on this machine: a token needs TLS (ca)"
            )
        return (("authorization", f"Bearer {self.token}"),)

    def channel(self) -> grpc.Channel:
        """A blocking channel; it connects by itself, and again when the server is back."""
        if tls := self._tls():
            return grpc.secure_channel(self.address, tls, options=CHANNEL_OPTIONS)
        return grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)

    def aio_channel(self) -> grpc.aio.Channel:
        """The same for asyncio."""
        if tls := self._tls():
            return grpc.aio.secure_channel(self.address, tls, options=CHANNEL_OPTIONS)
        return grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)


def is_loopback(address: str) -> bool:
    """Whether a `host:port` address is on this machine by its spelling, without asking DNS."""
    host = address.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_port(
    server: Any, address: str, *, token: str | None = None, tls: ServerTls | None = None
) -> PortLock | None:
    """Adds `address` to a grpc or grpc.aio server that has not started.

    Returns the lock that must be held, for a unix socket, as long as the server runs. Raises
    FailedPrecondition when the address is taken, InvalidArgument for TCP without a token, or
    beyond loopback without TLS.
    """
    if path := socket_path(address):
        lock = lock_socket(path)
        server.add_insecure_port(address)
        return lock
    _require_guard(address, token, tls)
    try:
        if tls:
            server.add_secure_port(address, tls.credentials())
        else:
            server.add_insecure_port(address)
    except RuntimeError as error:
        raise FailedPrecondition(
            f"The address {address} cannot be opened; another server may have it. "
            "Stop that one or choose another address.",
            reason="ADDRESS_TAKEN",
        ) from error
    return None


def _require_guard(address: str, token: str | None, tls: ServerTls | None) -> None:
    if not token and not (tls and tls.client_ca):
        raise InvalidArgument.at("listen", f"{address} is TCP and needs a token or client TLS")
    if tls is None and not is_loopback(address):
        raise InvalidArgument.at("listen", f"{address} is beyond this machine and needs TLS")


def lock_socket(path: Path, owner: str = "") -> PortLock:
    """The lock beside a unix socket, in a folder of this user's alone.

    Raises FailedPrecondition where the folder cannot be used, or when another server has the
    socket; the error's metadata then holds that one's `owner`.
    """
    private_folder(path.parent)
    return PortLock(path, owner)


class PortLock:
    """A lock file beside a unix socket.

    Without it a second server would take the path over and get every new client, while the first
    one goes on unseen. The kernel drops the lock with the process, however that ends.

    Args:
        owner: written into the file, for servers that come later.
    """

    def __init__(self, socket: Path, owner: str = ""):
        self._file = socket.with_suffix(".lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read()
            self._file.close()
            raise FailedPrecondition(
                f"Another server already holds {socket}. Stop it, or choose another state folder "
                "with APOLLO_STATE_DIR.",
                reason="SOCKET_TAKEN",
                metadata={"owner": holder},
            ) from error
        self._file.truncate(0)
        self._file.write(owner)
        self._file.flush()
        socket.unlink(missing_ok=True)

    def release(self) -> None:
        """Lets another server have the socket."""
        self._file.close()


def read_or_create_token(path: Path) -> str:
    """The token in `path`, made with mode 0600 where there is none."""
    private_folder(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(descriptor, "w") as file:
        file.write(token := secrets.token_urlsafe(32))
    return token


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(
            f"The TLS file {path} cannot be read: {error.strerror}.", reason="TLS_FILE_UNREADABLE"
        ) from error
