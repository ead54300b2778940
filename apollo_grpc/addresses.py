"""Addresses as users write them, `unix:PATH` or `HOST:PORT`: checked, and as grpc reads them."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from urllib.parse import quote

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.locations import socket_address, socket_path

_DNS = "dns:///"
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
MAX_PORT = 65535
_SHOWN = 120


def require_address(address: str, field: str = "address", *, listens: bool = False) -> str:
    """The address itself, of a socket with its absolute path.

    Args:
        field: what the user has set, as the error names it.
        listens: a server's, for which port 0 is one that the system picks.

    Raises InvalidArgument for what is no address, FailedPrecondition for a socket's path that
    cannot be used.
    """
    if path := socket_path(address):
        if address == "unix:":
            raise InvalidArgument.at(field, "'unix:' names no socket; write unix:PATH")
        return socket_address(path)
    address = address.strip()
    host, _, port = address.removeprefix(_DNS).rpartition(":")
    if not _is_host(host) or not _PORT.fullmatch(port):
        raise InvalidArgument.at(field, f"{address[:_SHOWN]!r} is no address; {_meant(address)}")
    lowest = 0 if listens else 1
    if not lowest <= int(port) <= MAX_PORT:
        raise InvalidArgument.at(
            field, f"{address[:_SHOWN]!r} names no port between {lowest} and {MAX_PORT}"
        )
    return address


def _meant(address: str) -> str:
    if "://" in address:
        return "write HOST:PORT without the scheme, or unix:PATH"
    if address.count(":") > 1 and "]" not in address:
        return "write an IPv6 address in brackets: [::1]:50051"
    if address.startswith("/"):
        return f"for a socket write unix:{address[:_SHOWN]}"
    return "write HOST:PORT or unix:PATH"


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return bool(_NAME.fullmatch(host))
    try:
        return host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    """Whether a `host:port` address is on this machine by its spelling, without asking DNS."""
    host = address.removeprefix(_DNS).rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def target(address: str) -> str:
    """The address as grpc reads it: a URI, in which `%`, `#`, `?` and more mean something."""
    path = socket_path(address)
    return f"unix:{quote(os.fsencode(path))}" if path else address


def why_not_bound(address: str) -> str:
    """What the system says where a TCP address cannot be listened on; grpc does not tell."""
    host, _, port = address.removeprefix(_DNS).rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as tried:
                tried.bind(place)
    except OSError as error:
        return error.strerror or str(error)
    return "another server may have it"
