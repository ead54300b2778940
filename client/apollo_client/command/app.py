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
    completion,
    config,
    dashboard,
    datasets,
    display,
    doctor,
    logs,
    plot,
    probes,
    runs,
    teach,
    token,
    train,
    up,
    watch,
)
from apollo_client.command.display import Json
from apollo_client.command.outcome import output_status, reported_errors
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

    'apollo config' tells which server is meant and why, 'apollo completion SHELL' makes a shell
    complete commands and options.

    Exit status: 0 done, 1 refused, failed, or rejected by its probes, 2 wrong input, 3 nobody
    there, 130 left by Ctrl-C.
    """
    with reported_errors():
        address = require_address(address, "--address") if address else None
    context.obj = Connection(address, token_file, ca, certificate, key)


app.command("train")(train.command)
app.command("teach")(teach.command)
app.command("watch")(watch.command)
app.command("wait")(runs.wait)
app.command("runs")(runs.list_runs)
app.command("run")(runs.show)
app.command("logs")(logs.command)
app.command("plot")(plot.command)
app.command("cancel")(runs.cancel)
app.command("delete")(runs.delete)


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
    with checkpoint.left_to_itself() as told, context.obj.client() as client:
        result = client.sync(progress=told, in_place=in_place)
    print(display.to_json(result) if as_json else display.sync_line(result))


app.add_typer(probes.app, name="probes")
app.add_typer(token.app, name="token")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(datasets.app, name="datasets")
app.command("dashboard")(dashboard.command)
app.command("config")(config.command)
app.command("completion")(completion.command)
_PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("up", context_settings=_PASSES_ON)(up.command)
app.command("doctor", context_settings=_PASSES_ON)(doctor.command)


@cache
def _command() -> Any:
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `apollo`; exits with one of `outcome`'s statuses."""
    prepare_streams()
    completion.answer_shells()
    status: Any = 0
    try:
        with reported_errors():
            _command()(arguments, prog_name="apollo")
    except SystemExit as ended:
        status = ended.code
    except typer.Exit as ended:
        status = ended.exit_code
    sys.exit(status or output_status())
