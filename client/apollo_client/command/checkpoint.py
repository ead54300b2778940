"""`apollo checkpoint`: what is done about the model directory besides a sync."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_client.command import display
from apollo_client.command.outcome import REFUSED, reported_errors

app = typer.Typer(no_args_is_help=True, help="Verify the model directory, or make it your own.")
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]


@app.command()
def verify(
    context: typer.Context,
    full: Annotated[bool, typer.Option("--full", help="Read the files, compare digests.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Compare the live weights too.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the model directory with what the last sync left there; writes nothing."""
    with reported_errors(), context.obj.client() as client:
        result = client.verify(full=full, live=live)
    print(display.to_json(result) if as_json else "\n".join(display.verify_lines(result)))
    if result.differences:
        raise typer.Exit(REFUSED)


@app.command()
def adopt(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Copy a model directory of links, or of a hub cache, to one that can be synced."""
    with reported_errors(), context.obj.client() as client:
        result = client.adopt(directory.absolute())
    print(display.to_json(result) if as_json else display.adopt_line(result))
