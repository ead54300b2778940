"""`apollo probes`: the model's regression set."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from apollo_client.command import display
from apollo_client.command.display import Json
from apollo_client.command.outcome import WRONG_INPUT, fail, reported_errors

app = typer.Typer(invoke_without_command=True)


@app.callback()
def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the probes that accepted runs left with the model, by name."""
    if context.invoked_subcommand:
        return
    token = ""
    with reported_errors(), context.obj.client() as client:
        while True:
            page = client.list_regression_probes(page_token=token)
            for probe in page.probes:
                print(display.to_json(probe) if as_json else display.probe_line(probe))
            if not (token := page.next_page_token):
                return


@app.command()
def delete(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="As 'apollo probes' lists them.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    as_json: Json = False,
) -> None:
    """Take probes out of the regression set; names that are not there are left out."""
    if bool(names) is all_:
        fail("name the probes to delete, or say --all. Nothing was deleted.", WRONG_INPUT)
    with reported_errors(), context.obj.client() as client:
        deleted = client.delete_regression_probes(None if all_ else names)
    print(json.dumps({"deleted": deleted}) if as_json else f"deleted {deleted}")
