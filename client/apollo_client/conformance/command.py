"""The `apollo-conformance` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from apollo_client.command.outcome import (
    INTERRUPTED,
    REFUSED,
    WRONG_INPUT,
    fail,
    output_status,
    reported_errors,
)
from apollo_client.conformance import (
    checkpoints,
    datasets,
    errors,
    listing,
    operations,
    probes,
    run_life,
    runs,
    samples,
    status,
    watching,
)
from apollo_client.conformance.promises import PROMISES, Level, Promise
from apollo_client.conformance.requirements import BrokenPromiseError
from apollo_client.conformance.server import Server
from apollo_client.conformance.verdicts import (
    FAILED,
    NOT_APPLICABLE,
    PASSED,
    Verdict,
    judge,
    line_of,
)
from apollo_client.connection import find_server, readable
from apollo_grpc.errors import DeadlineExceeded, Unauthenticated, Unavailable
from apollo_grpc.locations import socket_path
from apollo_grpc.standard_streams import prepare_streams
from apollo_grpc.tokens import read_token
from apollo_grpc.transport import Endpoint

# The order in which they are tried.
SUBJECTS = (
    status,
    errors,
    runs,
    run_life,
    listing,
    watching,
    samples,
    probes,
    datasets,
    checkpoints,
    operations,
)
CALL_SECONDS = 120.0
COLOURS = {PASSED: typer.colors.GREEN, FAILED: typer.colors.RED, NOT_APPLICABLE: None}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(
    address: Annotated[str, typer.Option(help="The server: unix:PATH or host:port.")],
    read_only: Annotated[
        bool,
        typer.Option("--read-only", help="Only what changes nothing: reads, and dry runs."),
    ] = False,
    with_checkpoints: Annotated[
        bool,
        typer.Option("--checkpoints", help="Also sync, snapshots, restore, undo, operations."),
    ] = False,
    folder: Annotated[
        str,
        typer.Option(
            help="Of --checkpoints: an absolute folder on the server's machine for an export and "
            "an adopted copy of the model, which stay there."
        ),
    ] = "",
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Only promises whose name or subject has it.")
    ] = "",
    seconds: Annotated[
        float, typer.Option(min=0.1, help="That a call may take, others' runs before it included.")
    ] = CALL_SECONDS,
    token_file: Annotated[
        Path | None, typer.Option(envvar="APOLLO_TOKEN_FILE", help="Holds the token, for TCP.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(envvar="APOLLO_CA", help="PEM CA of the server, or 'system'.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(envvar="APOLLO_CERTIFICATE", help="PEM, for mTLS.")
    ] = None,
    key: Annotated[Path | None, typer.Option(envvar="APOLLO_KEY", help="PEM, for mTLS.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, for programs.")
    ] = False,
) -> None:
    """Does a server keep what apollo.v1 promises? Calls every method, and says so of each promise.

    With --read-only the weights, the optimizer and the server's data stay as they are: it reads,
    and makes dry runs of a few short samples, which wait in the queue with the others, and are
    deleted when it ends.

    By default it also makes runs of one step with learning rate 0. These leave each weight as it
    is, but count as updates: the weight version and the optimizer's step go up, its moments move,
    and the oldest updates can no longer be undone. Small datasets are uploaded and deleted.

    With --checkpoints it also syncs the model directory, makes and deletes snapshots, and goes back
    by restore and undo, though never over the update of somebody else. Operations stay listed.

    A token needs the scope admin: with less, what is not allowed is not applicable, and the runs
    that were made stay.

    Exit status: 0 all that could be tried was kept, 1 a promise was broken, 2 wrong usage,
    3 nobody there.
    """
    if read_only and with_checkpoints:
        fail("--read-only and --checkpoints exclude each other.", WRONG_INPUT)
    if folder and not (with_checkpoints and Path(folder).is_absolute()):
        fail("--folder needs an absolute path, and --checkpoints.", WRONG_INPUT)
    level = Level.CHECKPOINTS if with_checkpoints else Level.WRITE
    chosen = _chosen(Level.READ if read_only else level, only)
    if not chosen:
        fail(f"no promise has {only!r} in its name or subject.", WRONG_INPUT)
    with reported_errors(), _interruptible():
        # A socket needs none, and the variable may name a file that only the server can read.
        named = token_file and not socket_path(address)
        token = read_token(token_file, "--token-file") if named and token_file else None
        endpoint = find_server(address, token, ca, certificate, key)
        verdicts = _tried(Server(endpoint, seconds, folder), endpoint, chosen, as_json)
    counts = {each: verdicts.count(each) for each in (PASSED, FAILED, NOT_APPLICABLE)}
    if not as_json:
        print(", ".join(f"{count} {word}" for word, count in counts.items()))
    if counts[FAILED]:
        raise typer.Exit(REFUSED)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _chosen(level: Level, only: str) -> list[Promise]:
    """Those up to a level, in the order of the subjects."""
    order = {subject.__name__: number for number, subject in enumerate(SUBJECTS)}
    found = [p for p in PROMISES if p.level <= level and (only in p.name or only == p.subject)]
    return sorted(found, key=lambda each: order[each.check.__module__])


def _tried(server: Server, endpoint: Endpoint, chosen: list[Promise], as_json: bool) -> list[str]:
    """Tries and prints each; what was made is taken away, whatever comes."""
    try:
        _require_there(server, endpoint)
        return [verdict.verdict for verdict in _printed(server, chosen, as_json)]
    finally:
        server.close()


def _require_there(server: Server, endpoint: Endpoint) -> None:
    """Raises Unavailable or DeadlineExceeded where no server answers, whatever it would."""
    try:
        server.status()
    except BrokenPromiseError:
        return
    except grpc.RpcError as error:
        known = readable(error, endpoint)
        if isinstance(known, Unauthenticated):
            fail(known.message, WRONG_INPUT)
        if isinstance(known, Unavailable | DeadlineExceeded):
            raise known from error


def _printed(server: Server, chosen: list[Promise], as_json: bool) -> Iterator[Verdict]:
    for each in chosen:
        verdict = judge(server, each)
        if as_json:
            print(json.dumps(asdict(verdict)), flush=True)
        else:
            typer.secho(line_of(verdict), fg=COLOURS[verdict.verdict])
            sys.stdout.flush()
        yield verdict


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `apollo-conformance`."""
    prepare_streams()
    ended: Any = 0
    try:
        app(arguments, prog_name="apollo-conformance")
    except SystemExit as error:
        ended = error.code
    sys.exit(ended or output_status())
