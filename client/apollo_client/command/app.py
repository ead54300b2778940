"""The commands and their options."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from apollo_client.client import ApolloClient
from apollo_client.command import (
    checkpoint,
    dashboard,
    datasets,
    display,
    doctor,
    probes,
    runs,
    teach,
    token,
    train,
    up,
)
from apollo_client.command.display import Json
from apollo_client.command.events import update_line
from apollo_client.command.outcome import output_status, reported_errors
from apollo_client.command.record import record
from apollo_client.command.run_display import follow
from apollo_grpc.addresses import require_address
from apollo_grpc.locations import server_address, socket_path
from apollo_grpc.standard_streams import prepare_streams
from apollo_grpc.tokens import read_token

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True)
class Connection:
    """The options that say which server is meant."""

    address: str | None
    token_file: Path | None
    ca: Path | None
    certificate: Path | None
    key: Path | None

    def client(self) -> ApolloClient:
        """A client for it."""
        token = None
        # A socket needs none, and the server's own variable may name a file that only it can read.
        if self.token_file and not socket_path(self.address or server_address()):
            token = read_token(self.token_file, "--token-file")
        return ApolloClient(
            self.address, token=token, ca=self.ca, certificate=self.certificate, key=self.key
        )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"apollo {version('apollo-grpc')}")
        raise typer.Exit


@app.callback()
def connection(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="APOLLO_ADDRESS",
            help="The training server: unix:PATH or host:port. Default: your own socket.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(envvar="APOLLO_TOKEN_FILE", help="Holds the token, for TCP.")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            envvar="APOLLO_CA",
            help="PEM CA of the server, for TLS; 'system', the default beyond this machine: those "
            "that it trusts.",
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(envvar="APOLLO_CERTIFICATE", help="PEM, for mTLS.")
    ] = None,
    key: Annotated[Path | None, typer.Option(envvar="APOLLO_KEY", help="PEM, for mTLS.")] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A language model that keeps learning while vLLM serves it.

    Exit status: 0 done, 1 refused, failed, or rejected by its probes, 2 wrong input, 3 nobody
    there.
    """
    with reported_errors():
        address = require_address(address, "--address") if address else None
    context.obj = Connection(address, token_file, ca, certificate, key)


app.command("train")(train.command)
app.command("runs")(runs.list_runs)
app.command("run")(runs.show)
app.command("cancel")(runs.cancel)
app.command("delete")(runs.delete)
app.command("teach")(teach.command)


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show the engine, the weights, the optimizer and the queue."""
    with reported_errors(), context.obj.client() as client:
        found = client.status()
    print(display.to_json(found) if as_json else "\n".join(display.status_lines(found)))


@app.command()
def info(context: typer.Context, as_json: Json = False) -> None:
    """Show versions, limits, and what the attached model can do."""
    with reported_errors(), context.obj.client() as client:
        found = client.server_info()
    print(display.to_json(found) if as_json else "\n".join(display.info_lines(found)))


@app.command()
def watch(
    context: typer.Context,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="From its first event to its end.")
    ] = None,
    all_runs: Annotated[
        bool, typer.Option("--all", help="Every event of all runs, none left out, from now on.")
    ] = False,
    after: Annotated[
        int | None,
        typer.Option(help="Of RUN_ID, only later sequences; of --all, revisions, from 0 on."),
    ] = None,
    run: Annotated[str, typer.Option(help="Only the events of this run.")] = "",
    min_interval: Annotated[float, typer.Option(help="Seconds between two statuses.")] = 0.0,
    to: Annotated[
        str,
        typer.Option(
            metavar="KIND:PLACE",
            help="Of RUN_ID, the figures: csv:FILE, tensorboard:DIR or wandb:PROJECT. Goes on "
            "where it ended.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Follow all runs and the status, every step's loss included, until Ctrl-C.

    With RUN_ID: every event of that run from its first, also of one that has ended, and then the
    status that 'apollo train' would have had.
    """
    if to:
        with reported_errors(), context.obj.client() as client:
            record(client, run_id or "", to, after or 0, as_json)
        return
    if run_id is not None:
        with reported_errors(), context.obj.client() as client:
            follow(client.watch_run(run_id, after or 0), as_json)
        return
    with reported_errors(), context.obj.client() as client:
        try:
            told: Any = client.watch_runs(after) if all_runs else client.watch(run, min_interval)
            for update in told:
                line = display.to_json(update) if as_json else update_line(update)
                print(line, flush=True)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


@app.command()
def sync(
    context: typer.Context,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Write into the files: where there is no room for new ones."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring the model directory up to date with what was learned."""
    with reported_errors(), context.obj.client() as client:
        result = client.sync(in_place=in_place)
    print(display.to_json(result) if as_json else display.sync_line(result))


app.add_typer(probes.app, name="probes")
app.add_typer(token.app, name="token")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(datasets.app, name="datasets")
app.command("dashboard")(dashboard.command)
_PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("up", context_settings=_PASSES_ON)(up.command)
app.command("doctor", context_settings=_PASSES_ON)(doctor.command)


@cache
def _command() -> Any:
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `apollo`; exits with one of `outcome`'s statuses."""
    prepare_streams()
    status: Any = 0
    try:
        with reported_errors():
            _command()(arguments, prog_name="apollo")
    except SystemExit as ended:
        status = ended.code
    except typer.Exit as ended:
        status = ended.exit_code
    sys.exit(status or output_status())
