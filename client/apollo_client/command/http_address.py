"""Where vLLM and the training server listen: as URLs to be opened, and whether they are free."""

from __future__ import annotations

import errno
import ipaddress
import socket

from apollo_grpc.locations import socket_path

_CONNECT_SECONDS = 2.0


def connectable(host: str) -> str:
    """A host to connect to: of one that means every address of this machine, its loopback."""
    try:
        given = ipaddress.ip_address(host or "0.0.0.0")
    except ValueError:
        return host
    loopback = "127.0.0.1" if given.version == 4 else "::1"
    return loopback if given.is_unspecified else host


def url(host: str, port: int, scheme: str = "http") -> str:
    """The address of vLLM's API, for any client."""
    host = connectable(host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"


def why_not_free(host: str, port: int) -> str:
    """Why vLLM cannot listen there, and what to do; empty where it can."""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(place)
    except OSError as error:
        return f"{_what(error, host, port)} Nothing was started."
    return ""


def _what(error: OSError, host: str, port: int) -> str:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine ({error.strerror})."
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} is in use on {host}: name another with --port."
    return f"vLLM cannot listen on port {port} of {host}: {error.strerror}."


def answers(address: str) -> bool:
    """Whether somebody accepts connections at `unix:PATH` or `HOST:PORT`."""
    try:
        if path := socket_path(address):
            with socket.socket(socket.AF_UNIX) as tried:
                tried.settimeout(_CONNECT_SECONDS)
                tried.connect(str(path))
        else:
            host, _, port = address.rpartition(":")
            place = (host.rpartition("/")[2].strip("[]"), int(port))
            socket.create_connection(place, _CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
