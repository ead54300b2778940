"""The HTTP port that Prometheus reads: on loopback, or with the server's TLS and its token."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from apollo_grpc.addresses import is_loopback, require_address, why_not_bound
from apollo_grpc.certificates import certificate_chain, roots
from apollo_grpc.errors import ApolloError, FailedPrecondition, InvalidArgument
from apollo_grpc.interceptors import Check
from apollo_grpc.locations import socket_path
from apollo_grpc.transport import ServerTls

log = logging.getLogger(__name__)
# Who reads less often than Prometheus does is cut off; more readers than these are turned away.
TIMEOUT_SECONDS, READERS = 10.0, 8
# Between two looks whether it is to stop.
STOP_SECONDS = 0.1


class MetricsPort:
    """Serves a registry over HTTP until `stop`, on threads of its own.

    Args:
        address: `host:port`; port 0 is one that the system picks, which `address` then has.
        tls: of the server, with its clients' CA where they need certificates.
        check: raises for a caller who may not go on; asked where there is TLS alone, as whoever is
            on this machine may know how fast it trains.

    Raises InvalidArgument for a socket, or an address beyond this machine without TLS,
    FailedPrecondition where it is taken or a TLS file cannot be used.
    """

    def __init__(
        self, registry: CollectorRegistry, address: str, tls: ServerTls | None, check: Check | None
    ):
        address = require_guarded(address, tls)
        host, _, port = address.rpartition(":")
        context = _context(tls) if tls else None
        try:
            self._server = _Server(host.strip("[]"), int(port), context)
        except OSError as error:
            raise FailedPrecondition(
                f"The address {address} of metrics cannot be opened ({why_not_bound(address)}). "
                "Stop the server that has it, or choose another one with APOLLO_METRICS_ADDRESS.",
                reason="ADDRESS_TAKEN",
            ) from error
        app = make_wsgi_app(registry)
        self._server.set_app(_checked(app, check) if tls and check else app)
        self.address = f"{host}:{self._server.server_port}"
        scheme = "https" if tls else "http"
        log.info("metrics are at %s://%s/metrics", scheme, self.address)
        serve = self._server.serve_forever
        self._thread = threading.Thread(
            target=serve, args=[STOP_SECONDS], name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Closes the port; who reads just now may not get the rest."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def require_guarded(address: str, tls: object) -> str:
    """The address of metrics. Raises InvalidArgument where it cannot be one."""
    address = require_address(address, "metrics_address", listens=True)
    if socket_path(address):
        raise InvalidArgument.at("metrics_address", "is a socket, and Prometheus reads HOST:PORT")
    if tls is None and not is_loopback(address):
        raise InvalidArgument.at(
            "metrics_address",
            f"{address} is beyond this machine and needs TLS (tls_certificate and tls_key); "
            "choose 127.0.0.1, or set both",
        )
    return address


def _context(tls: ServerTls) -> ssl.SSLContext:
    certificate_chain(tls.certificate, tls.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key, password="")
    if tls.client_ca:
        authorities = roots(tls.client_ca).decode("ascii", errors="ignore")
        context.load_verify_locations(cadata=authorities)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class _Caller:
    """A caller over HTTP, as a check knows those of gRPC."""

    def __init__(self, environ: dict[str, Any]):
        self._peer = f"http:{environ.get('REMOTE_ADDR', '')}:0"
        self._sent = (("authorization", str(environ.get("HTTP_AUTHORIZATION", ""))),)

    def peer(self) -> str:
        """Never one on a unix socket, who may do all."""
        return self._peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The header with the token."""
        return self._sent


def _checked(app: Any, check: Check) -> Any:
    def checked(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        try:
            check(_Caller(environ))
        except ApolloError:
            headers = [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")]
            start("401 Unauthorized", headers)
            return [b"Send the header 'Authorization: Bearer TOKEN'.\n"]
        found: Iterable[bytes] = app(environ, start)
        return found

    return checked


class _Quiet(WSGIRequestHandler):
    # Of each read, the TLS handshake's too.
    timeout = TIMEOUT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Callers choose what would be logged."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, place = found[0][0], found[0][4]
        self._context, self._room = context, threading.Semaphore(READERS)
        super().__init__((str(place[0]), int(place[1])), _Quiet)

    def server_bind(self) -> None:
        """Without asking DNS for the name of the host, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def get_request(self) -> tuple[Any, Any]:
        """The handshake waits for the connection's own thread: it may take as long as callers."""
        connection, place = self.socket.accept()
        if self._context:
            connection = self._context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, place

    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives the connection a thread, where there is room."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves the connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of a caller that went, or is no reader of metrics."""
        log.debug("a reader of metrics was not served", exc_info=True)
