"""Where the training server is, how a caller shows who it is, and what a failed call means."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apollo_grpc.errors import ApolloError, Unavailable, from_rpc_error
from apollo_grpc.locations import server_address, socket_path, state_folder
from apollo_grpc.transport import Endpoint, is_loopback
from apollo_grpc.v1 import checkpoint_pb2

Told = Callable[[checkpoint_pb2.Progress], None]

STATUS_SECONDS = 10.0
# A server that loads torch and maps a large model again may take most of it.
RETRY_SECONDS = 120.0


def find_server(
    address: str | None = None,
    token: str | None = None,
    ca: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Endpoint:
    """The endpoint that is meant, from arguments, then environment, then the state folder.

    Args:
        address: `unix:PATH` or `host:port`; else $APOLLO_ADDRESS, else the user's own socket.
        token: of a TCP server; else $APOLLO_TOKEN, else, on this machine, the state folder's.
        ca, certificate, key: PEM files for TLS and mTLS.
    """
    address = address or server_address()
    if token is None and socket_path(address) is None:
        token = os.environ.get("APOLLO_TOKEN") or _own_token(address)
    return Endpoint(address, token, ca, certificate, key)


def _own_token(address: str) -> str | None:
    """The token that this user's own server made; never one for another machine."""
    path = state_folder() / "token"
    return path.read_text().strip() if is_loopback(address) and path.is_file() else None


def readable(error: Any, endpoint: Endpoint) -> ApolloError:
    """The domain error behind a failed call, in words that say what to do.

    A server's own error passes as it is; a broken or refused connection has no words of a
    server's and gets ours.
    """
    known = from_rpc_error(error)
    if not isinstance(known, Unavailable) or known.reason != Unavailable.default_reason:
        return known
    return Unavailable(
        f"No training server answers at {endpoint.address}. Start one with 'apollo up MODEL', or "
        "name another with --address or APOLLO_ADDRESS. A run that was accepted goes on as long "
        "as its server lives.",
        reason="SERVER_UNREACHABLE",
        metadata={"address": endpoint.address, "cause": known.message},
    )
