"""`apollo datasets`: samples that the server keeps, for runs that name them."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from apollo_client.command import display
from apollo_client.command.display import Json
from apollo_client.command.latest_line import counted, latest_line
from apollo_client.command.outcome import reported_errors
from apollo_client.command.train import read
from apollo_client.forms import SAMPLES

app = typer.Typer(no_args_is_help=True, help="Samples on the server, for 'apollo train --dataset'.")


@app.command()
def add(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="As 'apollo train' takes it; one after the other."),
    ],
    name: Annotated[str, typer.Option(help="For people; default: the first file's.")] = "",
    as_json: Json = False,
) -> None:
    """Bring the samples of files to the server, as one dataset; the same samples are the same one.

    A file is in memory while it is sent: cut one of gigabytes, as 'split -C 60m' does, and name all
    its parts.
    """
    with reported_errors(), latest_line("reading") as show, context.obj.client() as client:
        samples = chain.from_iterable(read(file, SAMPLES) for file in files)
        made = client.create_dataset(counted(samples, show), name=name or files[0].name)
    print(display.to_json(made) if as_json else display.dataset_line(made))


@app.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the datasets, newest first."""
    token = ""
    with reported_errors(), context.obj.client() as client:
        while True:
            page = client.datasets(page_token=token)
            for found in page.datasets:
                print(display.to_json(found) if as_json else display.dataset_line(found))
            if not (token := page.next_page_token):
                return


@app.command()
def delete(
    context: typer.Context,
    dataset_id: Annotated[str, typer.Argument(help="As 'list' lists it.")],
    as_json: Json = False,
) -> None:
    """Delete a dataset that no run needs any more."""
    with reported_errors(), context.obj.client() as client:
        client.delete_dataset(dataset_id)
    print(json.dumps({"deleted": dataset_id}) if as_json else f"deleted {dataset_id}")
