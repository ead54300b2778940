"""`apollo config`: which server is meant, by which token and files, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import typer

from apollo_client.command.display import Json, state_name
from apollo_client.command.outcome import exit_status, fail, reported_errors
from apollo_grpc.addresses import is_loopback
from apollo_grpc.errors import ApolloError
from apollo_grpc.locations import server_address, socket_path, state_folder
from apollo_grpc.v1 import status_pb2

DEFAULT, UNUSED = "default", "unused"
_FILES = ("ca", "certificate", "key")


@dataclass(frozen=True)
class Setting:
    """What is used, and why.

    Attributes:
        value: None for a token that stands in a variable, and where there is none.
        source: the option or the variable that says it; `default`, or `unused` for no effect.
    """

    value: str | None
    source: str


def command(context: typer.Context, as_json: Json = False) -> None:
    """Show which address and which token file are used, why, and whether a server answers there.

    Exit status 0 where one does. No token is shown.
    """
    with reported_errors():
        found = dict(settings(context))
    status, error = _ask(context)
    server = _server(status, error)
    if as_json:
        shown = {name: asdict(setting) for name, setting in found.items()}
        print(json.dumps({**shown, "server": server}))
    else:
        for name, setting in found.items():
            print(f"{name.replace('_', ' '):<12} {setting.value or '-'}  ({setting.source})")
        answer = f"{server['version']}, {server['engine']}" if status else "no answer"
        print(f"{'server':<12} {answer}")
    if error:
        fail(f"{error.message} ({error.reason})", exit_status(error))


def settings(context: typer.Context) -> Iterator[tuple[str, Setting]]:
    """Each setting of the connection by its name. Raises as `state_folder`."""
    given, root = context.obj, context.find_root()
    address = given.address or server_address()
    yield "state_folder", Setting(str(state_folder()), _folder_source())
    yield "address", Setting(address, _source(root, "address"))
    yield "token_file", _token(root, address)
    for name in _FILES:
        value, source = getattr(given, name), _source(root, name)
        if value and socket_path(address):
            source = f"{UNUSED}: a socket has no TLS"
        yield name, Setting(str(value) if value else None, source)


def _folder_source() -> str:
    named = [name for name in ("APOLLO_STATE_DIR", "XDG_STATE_HOME") if os.environ.get(name)]
    return named[0] if named else DEFAULT


def _source(root: Any, name: str) -> str:
    """Where an option's value comes from."""
    sources = {
        "COMMANDLINE": f"--{name.replace('_', '-')}",
        "ENVIRONMENT": f"APOLLO_{name.upper()}",
    }
    return sources.get(root.get_parameter_source(name).name, DEFAULT)


def _token(root: Any, address: str) -> Setting:
    """As `Connection.client` and `find_server` choose it."""
    if socket_path(address):
        return Setting(None, f"{UNUSED}: a socket needs no token")
    if file := root.obj.token_file:
        return Setting(str(file), _source(root, "token_file"))
    if os.environ.get("APOLLO_TOKEN"):
        return Setting(None, "APOLLO_TOKEN")
    own = state_folder() / "token"
    found = is_loopback(address) and own.is_file()
    return Setting(str(own) if found else None, DEFAULT)


def _ask(context: typer.Context) -> tuple[status_pb2.ServerStatus | None, ApolloError | None]:
    try:
        with context.obj.client() as client:
            return client.status(), None
    except ApolloError as error:
        return None, error


def _server(
    status: status_pb2.ServerStatus | None, error: ApolloError | None
) -> dict[str, str | bool | None]:
    engine = status and state_name(
        status.attachment, status_pb2.AttachmentState, "ATTACHMENT_STATE_"
    )
    return {
        "answers": status is not None,
        "version": status.server_version if status else None,
        "engine": engine.lower() if engine else None,
        "reason": error.reason if error else None,
    }
