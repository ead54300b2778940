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
from rich.console import Console

from apollo_client.client import ApolloClient, RunStream
from apollo_client.command import checkpoint, display, doctor, up
from apollo_client.command.outcome import INTERRUPTED, REFUSED, output_status, reported_errors
from apollo_client.sample_files import read_placed, read_standard_input
from apollo_grpc.addresses import require_address
from apollo_grpc.locations import server_address, socket_path
from apollo_grpc.standard_streams import prepare_streams
from apollo_grpc.tokens import read_token
from apollo_grpc.v1 import training_pb2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]


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
            help="PEM CA of the server, for TLS; 'system': those that this machine trusts.",
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

    Exit status: 0 done, 1 refused or failed, 2 wrong input, 3 nobody there.
    """
    with reported_errors():
        address = require_address(address, "--address") if address else None
    context.obj = Connection(address, token_file, ca, certificate, key)


@app.command()
def train(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="JSON lines or one array, or - for standard input.")],
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, on AdamW's scale.")] = None,
    samples_per_step: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Shuffles each epoch.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the projection.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of a rising lr.")] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Tell each sample's loss before and after.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compute each step, and write nothing.")
    ] = False,
    coherence: Annotated[
        str | None,
        typer.Option(help="live, pause_step or pause_run (default): when vLLM waits for writes."),
    ] = None,
    cache_policy: Annotated[
        str | None,
        typer.Option(help="reset_at_end (default), reset_each_step or keep: vLLM's prefixes."),
    ] = None,
    max_loss: Annotated[float | None, typer.Option(help="A step above is not written.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    max_update_ratio: Annotated[
        float | None, typer.Option(help="Likewise: of an update's norm over the weights'.")
    ] = None,
    min_loss: Annotated[
        float | None,
        typer.Option(
            help="The run ends once each sample's latest loss is below; default 0.02 nats, 0 never."
        ),
    ] = None,
    max_wall_time: Annotated[float | None, typer.Option(help="Seconds; then the run ends.")] = None,
    reset_optimizer: Annotated[
        bool, typer.Option("--reset-optimizer", help="Drop the optimizer's state first.")
    ] = False,
    accept_other_weights: Annotated[
        bool,
        typer.Option(
            "--accept-other-weights",
            help="Go on with a state of other weights, as after vLLM restarted without a sync.",
        ),
    ] = False,
    request_id: Annotated[
        str | None,
        typer.Option(help="The same id and samples again attach to the first run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn the samples of FILE; the model serves what it learned as soon as the run has ended.

    A line is {"context": "...", "continuation": "..."}, or {"context_ids": [...],
    "continuation_ids": [...]}, or {"messages": [...]} whose last one is the assistant's; messages
    may have OpenAI's "weight": 0 or 1, and then each answer of weight 1 is learned. The
    continuation is learned, the context is read. Ctrl-C leaves the run going.
    """
    options: Any = {
        "epochs": epochs,
        "lr": lr,
        "samples_per_step": samples_per_step,
        "seed": seed,
        "rank": rank,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "evaluate": evaluate or None,
        "dry_run": dry_run or None,
        "coherence": coherence,
        "cache_policy": cache_policy,
        "max_loss": max_loss,
        "max_grad_norm": max_grad_norm,
        "max_update_ratio": max_update_ratio,
        "min_loss": min_loss,
        "max_wall_time": max_wall_time,
        "reset_optimizer": reset_optimizer or None,
        "accept_other_weights": accept_other_weights or None,
    }
    with reported_errors():
        samples = read_standard_input() if str(file) == "-" else read_placed(file)
        with context.obj.client() as client:
            events = client.train(samples, request_id=request_id, **options)
            finished = _follow(events, as_json)
    if finished.state != training_pb2.RUN_STATE_SUCCEEDED:
        raise typer.Exit(REFUSED)


def _follow(stream: RunStream, as_json: bool) -> training_pb2.Finished:
    run_id, finished = "", training_pb2.Finished()

    def events() -> Any:
        nonlocal run_id
        for event in stream:
            run_id = event.run_id
            yield event

    try:
        if not as_json:
            return display.RunDisplay(Console()).follow(events())
        for event in events():
            print(display.to_json(event), flush=True)
            finished = event.finished
    except KeyboardInterrupt:
        where = (
            f"Run {run_id} goes on; 'apollo watch {run_id}' follows it, 'apollo cancel {run_id}'"
        )
        where = f"{where} ends it." if run_id else "Nothing was heard of the run yet."
        print(f"\n{where}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    return finished


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show the engine, the weights, the optimizer and the queue."""
    with reported_errors(), context.obj.client() as client:
        found = client.status()
    print(display.to_json(found) if as_json else "\n".join(display.status_lines(found)))


@app.command()
def watch(
    context: typer.Context,
    run_id: Annotated[
        str, typer.Argument(metavar="[RUN_ID]", help="From its first event to its end.")
    ] = "",
    after: Annotated[int, typer.Option(help="Of RUN_ID, only later sequences.")] = 0,
    run: Annotated[str, typer.Option(help="Only the events of this run.")] = "",
    min_interval: Annotated[float, typer.Option(help="Seconds between two statuses.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Follow all runs and the status, every step's loss included, until Ctrl-C.

    With RUN_ID: every event of that run from its first, also of one that has ended, and then the
    status that 'apollo train' would have had.
    """
    if run_id:
        with reported_errors(), context.obj.client() as client:
            finished = _follow(client.watch_run(run_id, after), as_json)
        if finished.state != training_pb2.RUN_STATE_SUCCEEDED:
            raise typer.Exit(REFUSED)
        return
    with reported_errors(), context.obj.client() as client:
        try:
            for update in client.watch(run, min_interval):
                line = display.to_json(update) if as_json else display.update_line(update)
                print(line, flush=True)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


@app.command()
def runs(
    context: typer.Context,
    state: Annotated[
        list[str] | None,
        typer.Option(help="queued, running, succeeded, failed or cancelled; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    as_json: Json = False,
) -> None:
    """List runs, newest first."""
    with reported_errors(), context.obj.client() as client:
        page = client.list_runs(limit, states=state or ())
    for found in page.runs:
        print(display.to_json(found) if as_json else display.run_line(found))


@app.command("run")
def show_run(
    context: typer.Context,
    run_id: Annotated[str, typer.Argument(help="As 'apollo runs' lists it.")],
    as_json: Json = False,
) -> None:
    """Show one run."""
    with reported_errors(), context.obj.client() as client:
        found = client.get_run(run_id)
    print(display.to_json(found) if as_json else "\n".join(display.run_lines(found)))


@app.command()
def cancel(
    context: typer.Context,
    run_id: Annotated[str, typer.Argument(help="As 'apollo runs' lists it.")],
    as_json: Json = False,
) -> None:
    """Ask a run to stop before its next step; what it learned until then stays."""
    with reported_errors(), context.obj.client() as client:
        found = client.cancel_run(run_id)
    print(display.to_json(found) if as_json else display.run_line(found))


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


app.add_typer(checkpoint.app, name="checkpoint")
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
