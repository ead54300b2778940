"""The one way to open a channel or a server port: address, TLS, token, limits, keepalive.

Unix sockets lie in a private folder and are guarded by a lock file. TCP is plaintext on loopback
only and always asks for a token; beyond loopback it also needs TLS.
"""

from __future__ import annotations

import fcntl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from apollo_grpc.addresses import is_loopback, require_address, target, why_not_bound
from apollo_grpc.certificates import SYSTEM, certificate_chain, roots
from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.locations import private_folder, socket_path, unusable
from apollo_grpc.tokens import as_token

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
Option = tuple[str, int | str]

CHANNEL_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long a connection may take at least, by this name of grpc's: TLS over a slow line takes
    # some of its round trips, and a server that many come to at once lets them wait.
    ("grpc.min_reconnect_backoff_ms", 5_000),
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
    # Of one connection, those that were reset before the server came to them included.
    ("grpc.max_concurrent_streams", 1024),
    # Of all of them, some 6 KiB each. Above the first number grpc cancels some at random, also of
    # callers who do nothing wrong, and above the second all.
    ("grpc.server.max_pending_requests", 8192),
    ("grpc.server.max_pending_requests_hard_limit", 16384),
)


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a server: its certificate chain, its key, and, for mTLS, its clients' CA."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Reads the files. Raises FailedPrecondition where one cannot be read."""
        ca = roots(self.client_ca) if self.client_ca else None
        return grpc.ssl_server_credentials(
            [certificate_chain(self.certificate, self.key)],
            root_certificates=ca,
            require_client_auth=ca is not None,
        )


@dataclass(frozen=True)
class Endpoint:
    """How a client reaches a server: address, and for TCP a token and, beyond loopback, TLS.

    A unix socket needs neither, and takes none. Beyond loopback nothing is ever plaintext; on it
    there is TLS where an authority or a certificate is given. Raises InvalidArgument for a
    certificate without its key, or the other way.

    Attributes:
        ca: a PEM file; else, as for `system`, the authorities that this system trusts.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.key):
            have, lacking = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise InvalidArgument.at(lacking, f"is missing, and {have} is set; TLS needs both")

    def _tls(self) -> grpc.ChannelCredentials | None:
        if socket_path(self.address):
            return None
        if not self.ca and not self.certificate and is_loopback(self.address):
            return None
        authorities = roots(self.ca or SYSTEM)
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(authorities)
        return grpc.ssl_channel_credentials(
            authorities, *certificate_chain(self.certificate, self.key)
        )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Call metadata that carries the token. Raises InvalidArgument for what is none."""
        if not self.token or socket_path(self.address):
            return ()
        return (("authorization", f"Bearer {as_token(self.token, 'token')}"),)

    def channel(self) -> grpc.Channel:
        """A blocking channel; it connects by itself, and again when the server is back."""
        if tls := self._tls():
            return grpc.secure_channel(target(self.address), tls, options=CHANNEL_OPTIONS)
        return grpc.insecure_channel(target(self.address), options=CHANNEL_OPTIONS)

    def aio_channel(self) -> grpc.aio.Channel:
        """The same for asyncio."""
        if tls := self._tls():
            return grpc.aio.secure_channel(target(self.address), tls, options=CHANNEL_OPTIONS)
        return grpc.aio.insecure_channel(target(self.address), options=CHANNEL_OPTIONS)


@dataclass(frozen=True)
class OpenPort:
    """A server's address once it is open, with the port that the system picked for 0."""

    address: str
    lock: PortLock | None = None

    def release(self) -> None:
        """Lets another server have it."""
        if self.lock:
            self.lock.release()


def open_port(
    server: Any, address: str, *, guarded: bool = False, tls: ServerTls | None = None
) -> OpenPort:
    """Adds `address` to a grpc or grpc.aio server that has not started.

    What is returned must be held as long as the server runs.

    Args:
        guarded: callers are asked for a token.

    Raises FailedPrecondition when the
    address is taken, InvalidArgument for TCP without a token, or beyond loopback without TLS.
    """
    address = require_address(address, "listen", listens=True)
    if path := socket_path(address):
        lock = lock_socket(path)
        try:
            server.add_insecure_port(target(address))
        except RuntimeError as error:
            lock.release()
            raise FailedPrecondition(
                f"The socket {path} cannot be opened; not every file system has sockets. Choose "
                "another folder with APOLLO_STATE_DIR.",
                reason="STATE_FOLDER_UNUSABLE",
            ) from error
        return OpenPort(address, lock)
    _require_guard(address, guarded, tls)
    try:
        if tls:
            port = server.add_secure_port(address, tls.credentials())
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise FailedPrecondition(
            f"The address {address} cannot be opened ({why_not_bound(address)}). "
            "Stop the server that has it, or choose another address.",
            reason="ADDRESS_TAKEN",
        ) from error
    return OpenPort(f"{address.rpartition(':')[0]}:{port}")


def _require_guard(address: str, guarded: bool, tls: ServerTls | None) -> None:
    if not guarded and not (tls and tls.client_ca):
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
        path = socket.with_suffix(".lock")
        path = path if path != socket else socket.with_name(f"{socket.name}.lock")
        try:
            # Unbuffered: closing it would otherwise try once more what a full disk refused.
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise unusable(path, error) from error
        try:
            self._take(socket, owner)
        except OSError as error:
            self._file.close()
            raise unusable(path, error) from error
        except BaseException:
            self._file.close()
            raise

    def _take(self, socket: Path, owner: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            raise FailedPrecondition(
                f"Another server already holds {socket}. Stop it, or choose another state folder "
                "with APOLLO_STATE_DIR.",
                reason="SOCKET_TAKEN",
                metadata={"owner": self._file.read().decode()},
            ) from error
        except OSError as error:
            raise unusable(socket, error, "flock") from error
        self._file.truncate(0)
        self._file.write(owner.encode())
        if socket.exists() and not stat.S_ISSOCK(socket.stat().st_mode):
            raise FailedPrecondition(
                f"{socket} is no socket, and was left as it is. Choose another address.",
                reason="ADDRESS_TAKEN",
            )
        socket.unlink(missing_ok=True)

    def release(self) -> None:
        """Lets another server have the socket."""
        self._file.close()
