"""The page's HTTP server: on loopback alone, for whoever was told its address."""

from __future__ import annotations

import hmac
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from apollo_client.client import ApolloClient
from apollo_client.dashboard.feed import Feed
from apollo_grpc.errors import ApolloError, InvalidArgument

HOST = "127.0.0.1"
# By which a browser may know this machine: another name is a stranger's that leads here (DNS
# rebinding). Any port, as a tunnel has its own.
_NAMES = {HOST, "localhost"}
# After so many a browser that does not read, or does not say what it wants, is given up.
_SECONDS = 60
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(("page.js", "tables.js", "chart.js"), "text/javascript; charset=utf-8"),
}
_HEADERS = {
    # The page asks this server alone, and nobody shows it within another.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Dashboard(ThreadingHTTPServer):
    """Serves the page until its `with` block ends; a thread a browser.

    Args:
        client: of the training server that is shown.
        port: 0: any that is free.

    Attributes:
        url: of the page. Its token keeps this machine's other users out.

    Raises InvalidArgument where the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, client: ApolloClient, port: int = 0):
        self.client, self.token = client, secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            says = f"{port} cannot be listened on ({error.strerror}); name another, or none"
            raise InvalidArgument.at("--port", says) from None
        self.url = f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a browser that left, or was given up."""


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard
    server_version, sys_version = "apollo", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        token, _, name = self.path.removeprefix("/").partition("/")
        if not self._is_meant():
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"Ask for 127.0.0.1.\n")
        elif not hmac.compare_digest(token.encode(), self.server.token.encode()):
            told = b"The address that 'apollo dashboard' printed leads to the page.\n"
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", told)
        elif name == "events":
            self._stream()
        elif kind := _TYPES.get(name := name or "index.html"):
            page = files("apollo_client.dashboard") / "page" / name
            self._answer(HTTPStatus.OK, kind, page.read_bytes())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"No such file.\n")

    def _is_meant(self) -> bool:
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in _NAMES
        except ValueError:
            return False

    def _answer(self, status: HTTPStatus, kind: str, body: bytes | None) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body or b"")

    def _stream(self) -> None:
        """Server-sent events until the browser leaves or the training server does."""
        self._answer(HTTPStatus.OK, "text/event-stream", None)
        self._send("begin", {})
        try:
            for kind, told in Feed(self.server.client):
                self._send(kind, told)
        except ApolloError as error:
            # The browser asks anew by itself.
            self._send("trouble", {"message": error.message, "reason": error.reason})

    def _send(self, kind: str, told: Any) -> None:
        self.wfile.write(f"event: {kind}\ndata: {json.dumps(told)}\n\n".encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the lines would hold the token."""
