"""`apollo token`: the tokens of a server, in its file, on its machine."""

from __future__ import annotations

import datetime
import json
import re
import secrets
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from apollo_client.command.display import Json
from apollo_client.command.outcome import REFUSED, WRONG_INPUT, fail, reported_errors
from apollo_grpc.locations import state_folder
from apollo_grpc.scopes import WORDS
from apollo_grpc.token_file import BARE, FIELD, edit, parsed
from apollo_grpc.tokens import Token, digest_of, read_text

app = typer.Typer(no_args_is_help=True)
# Of the word that stands before the digest in the file.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_MAX_DAYS = 36500
_READ_AGAIN = "a server that runs takes it at SIGHUP (systemctl reload), or when it starts again"


class ScopeWord(StrEnum):
    """What `--scope` takes."""

    READ = "read"
    TRAIN = "train"
    ADMIN = "admin"


@app.callback()
def tokens() -> None:
    """Add, list and remove the tokens of a server, in its file, on its machine.

    The file is --token-file (APOLLO_TOKEN_FILE), or 'token' in the state folder.
    """


@app.command()
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Whose it is; letters, digits, '.', '_', '-'.")],
    scope: Annotated[
        ScopeWord, typer.Option(help="read: looks; train: also trains; admin: also deletes.")
    ],
    days: Annotated[
        int, typer.Option(min=0, max=_MAX_DAYS, help="Until it expires; 0: never.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make a token and show it, this once: the file keeps a digest, from which it does not come."""
    if not _NAME.fullmatch(name) or name == BARE:
        fail(f"{name!r} is no name of a token. Nothing was made.", WRONG_INPUT)
    secret = secrets.token_urlsafe(32)
    made = Token(name, WORDS[scope.value], digest_of(secret), _after(days))

    def change(before: tuple[Token, ...]) -> tuple[Token, ...]:
        if any(token.name == name for token in before):
            fail(f"there is a token '{name}' already; remove it first.", REFUSED)
        return (*before, made)

    with reported_errors():
        edit(_path(context), change)
    shown = {"name": name, "scope": scope.value, "expires": made.until(), "token": secret}
    print(json.dumps(shown) if as_json else secret)
    typer.echo(f"'{name}' may {scope.value}, until {made.until()}; {_READ_AGAIN}", err=True)


@app.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the tokens by name, scope and end; 'bare' is the one that the file holds as it is."""
    with reported_errors():
        path = _path(context)
        found = parsed(read_text(path, FIELD), f"{FIELD}: {path}")
    for token in found:
        ended = " (expired)" if token.expired() else ""
        shown = {"name": token.name, "scope": token.scope.word, "expires": token.until()}
        line = f"{token.name:<24} {token.scope.word:<6} {token.until()}{ended}"
        print(json.dumps(shown) if as_json else line)


@app.command()
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="As 'list' lists it.")],
    as_json: Json = False,
) -> None:
    """Take a token out; calls that are open go on until they end."""

    def change(before: tuple[Token, ...]) -> tuple[Token, ...]:
        kept = tuple(token for token in before if token.name != name)
        if kept == before:
            fail(f"there is no token '{name}'; 'apollo token list' lists them.", REFUSED)
        if not kept:
            fail(
                f"'{name}' is the last one, without which no server starts; add another first.",
                REFUSED,
            )
        return kept

    with reported_errors():
        # Without it, the folder of a file that is not there would be made.
        read_text(_path(context), FIELD)
        edit(_path(context), change)
    print(json.dumps({"removed": name}) if as_json else f"removed '{name}'; {_READ_AGAIN}")


def _path(context: typer.Context) -> Path:
    chosen: Path | None = context.obj.token_file
    return chosen or state_folder() / "token"


def _after(days: int) -> datetime.datetime | None:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return now + datetime.timedelta(days=days) if days else None
