"""Where the training server is, how a caller shows who it is, and what a failed call means."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from apollo_grpc.addresses import is_loopback, require_address
from apollo_grpc.errors import ApolloError, InvalidArgument, Unavailable
from apollo_grpc.locations import server_address, socket_path, state_folder
from apollo_grpc.statuses import from_rpc_error, is_told
from apollo_grpc.tokens import as_token, own_token, read_token
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import checkpoint_pb2

Told = Callable[[checkpoint_pb2.Operation.Progress], None]
M = TypeVar("M")
MAX_SHOWN = 120

# What grpc says of a handshake that failed, and what to do.
_TLS = {
    "CERTIFICATE_VERIFY_FAILED": "The certificate of what is there is of no authority that is "
    "trusted here, or of another name, or over; name its authority with --ca or APOLLO_CA.",
    "WRONG_VERSION_NUMBER": "What is there speaks no TLS; leave out --ca and --certificate.",
    "Socket closed": "What is there ends the connection: a server with TLS does so without --ca, "
    "or where it asks for --certificate and --key and gets none that it trusts.",
}
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
        token: of a TCP server; else of $APOLLO_TOKEN_FILE, else $APOLLO_TOKEN, else, on this
            machine, the state folder's.
        ca, certificate, key: PEM files for TLS and mTLS; else $APOLLO_CA, $APOLLO_CERTIFICATE and
            $APOLLO_KEY. Beyond this machine there is always TLS; without `ca`, as for `system`, the
            authorities that this system trusts are trusted.

    Raises InvalidArgument for what is no address, token or pair of files, FailedPrecondition where
    there is no state folder.
    """
    address = require_address(address or server_address())
    if socket_path(address):
        return Endpoint(address)
    if token is None:
        token = _given_token() or _own_token(address)
    files = (
        given or _named_file(name)
        for given, name in ((ca, "CA"), (certificate, "CERTIFICATE"), (key, "KEY"))
    )
    return Endpoint(address, as_token(token, "token") if token is not None else None, *files)


def _given_token() -> str | None:
    if file := _named_file("TOKEN_FILE"):
        return read_token(file, "APOLLO_TOKEN_FILE")
    given = os.environ.get("APOLLO_TOKEN")
    return as_token(given, "APOLLO_TOKEN") if given else None


def _named_file(name: str) -> Path | None:
    given = os.environ.get(f"APOLLO_{name}")
    return Path(given) if given else None


def _own_token(address: str) -> str | None:
    """The token that this user's own server made; never one for another machine."""
    path = state_folder() / "token"
    return own_token(path, "token") if is_loopback(address) and path.is_file() else None


def message(kind: type[M], **fields: Any) -> M:
    """A request. Raises InvalidArgument with the field whose value it cannot hold."""
    made: Any = kind()
    for name, value in fields.items():
        if value is None:
            continue
        try:
            setattr(made, name, value)
        except (TypeError, ValueError) as error:
            raise InvalidArgument.at(name, f"cannot be {str(value)[:MAX_SHOWN]!r}") from error
    found: M = made
    return found


def readable(error: Any, endpoint: Endpoint) -> ApolloError:
    """The domain error behind a failed call, in words that say what to do.

    A server's own error passes as it is; a broken or refused connection has no words of a
    server's and gets ours.
    """
    known = from_rpc_error(error)
    if not isinstance(known, Unavailable) or is_told(error):
        return known
    todo = _todo(endpoint, known.message)
    return Unavailable(
        f"No training server answers at {endpoint.address}. {todo} A run that was "
        "accepted goes on as long as its server lives.",
        reason="SERVER_UNREACHABLE",
        metadata={"address": endpoint.address, "cause": known.message},
    )


def _todo(endpoint: Endpoint, cause: str) -> str:
    path = socket_path(endpoint.address)
    for words, todo in _TLS.items():
        if words in cause and not path:
            return todo
    try:
        if path:
            path.stat()
    except PermissionError:
        return (
            "Its folder is another user's, and only that one may enter; be that user, or have it "
            "listen on TCP, with a token."
        )
    except OSError:
        pass
    return "Start one with 'apollo up MODEL', or name another with --address or APOLLO_ADDRESS."
