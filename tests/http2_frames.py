"""HTTP/2 by hand, for callers who keep to none of its manners; RFC 9113 and RFC 7541."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator
from typing import Any

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
# RFC 9113, 6.5.2 and 6.9.2.
INITIAL_WINDOW_SIZE, FIRST_WINDOW, MAX_FRAME = 4, 65535, 16384
CANCEL = struct.pack(">I", 8)


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(fields: dict[str, str]) -> bytes:
    """HPACK with every field as a literal that is not indexed, without Huffman's code."""
    return b"".join(
        b"\0" + _string(name.encode()) + _string(value.encode()) for name, value in fields.items()
    )


def _string(data: bytes) -> bytes:
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, prefix = len(data) - 127, bytearray([127])
    while rest >= 128:
        prefix.append(rest % 128 + 128)
        rest //= 128
    return bytes([*prefix, rest]) + data


def message(data: bytes, *, size: int | None = None, compressed: bool = False) -> bytes:
    """A message of gRPC with its prefix, which may lie about its size."""
    return struct.pack(">BI", compressed, len(data) if size is None else size) + data


class Connection:
    """One to a server of gRPC, past the preface and no further; a context.

    Args:
        address: `host:port`.
        tls: of a client, with `h2` asked for; None for plaintext.
    """

    def __init__(self, address: str, tls: ssl.SSLContext | None = None, seconds: float = 120.0):
        host, _, port = address.rpartition(":")
        self.socket: socket.socket = socket.create_connection((host, int(port)), seconds)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname=host)
        self.socket.sendall(PREFACE + frame(SETTINGS))
        self._received = bytearray()
        # What the other side takes: of the whole connection, and of each stream as it begins.
        self._room = {0: FIRST_WINDOW}
        self._window = FIRST_WINDOW

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.close()

    def head(self, stream: int, method: str, **fields: str) -> bytes:
        """The frame that begins a call; `_` in a field's name is `-`."""
        given = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost"}
        given |= {"content-type": "application/grpc", "te": "trailers"}
        given |= {name.replace("_", "-"): value for name, value in fields.items()}
        return frame(HEADERS, END_HEADERS, stream, header_block(given))

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of all that comes, pings and settings answered."""
        while True:
            size, kind, flags, stream = self._header()
            payload = self._take(size)
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.socket.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
            self._count(kind, stream, payload)
            yield kind, flags, stream, payload

    def _count(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            more = struct.unpack(">I", payload)[0]
            self._room[stream] = self._room.get(stream, self._window) + more
        for name, value in struct.iter_unpack(">HI", payload) if kind == SETTINGS else ():
            if name == INITIAL_WINDOW_SIZE:
                self._room = {
                    at: r + (value - self._window if at else 0) for at, r in self._room.items()
                }
                self._window = value

    def _header(self) -> tuple[int, int, int, int]:
        head = self._take(9)
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        return int.from_bytes(head[:3], "big"), kind, flags, stream

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionResetError("the server closed the connection")
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def pour(self, stream: int, data: bytes) -> tuple[int, bytes]:
        """Sends data as the other side has room for it; what ended the stream, as `end_of`."""
        sent, answers = 0, self.frames()
        while sent < len(data):
            room = min(self._room[0], self._room.get(stream, self._window), MAX_FRAME)
            if room <= 0:
                kind, _, at, payload = next(answers)
                if at == stream and kind in (HEADERS, RST_STREAM):
                    return kind, payload
                continue
            part = data[sent : sent + room]
            self.socket.sendall(frame(DATA, 0, stream, part))
            sent += len(part)
            self._room[0] -= len(part)
            self._room[stream] = self._room.get(stream, self._window) - len(part)
        return self.end_of(stream)

    def end_of(self, stream: int) -> tuple[int, bytes]:
        """The kind and payload of the frame that ends a stream, or the whole connection."""
        for kind, flags, at, payload in self.frames():
            ends = kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM)
            if (at == stream and ends) or kind == GOAWAY:
                return kind, payload
        raise AssertionError("frames end by raising")
