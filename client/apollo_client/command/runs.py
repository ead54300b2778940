"""`apollo runs`, `run`, `cancel` and `delete`: runs that the server knows."""

from __future__ import annotations

from typing import Annotated

import typer

from apollo_client.command import display
from apollo_client.command.display import Json
from apollo_client.command.outcome import reported_errors
from apollo_client.sample_values import shown
from apollo_grpc.errors import InvalidArgument

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="As 'apollo runs' lists it.")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="Of the run; may be repeated."),
]


def read_labels(words: list[str] | None) -> dict[str, str]:
    """Labels from KEY=VALUE. Raises InvalidArgument for a word that is none."""
    labels = {}
    for word in words or ():
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise InvalidArgument.at("--label", f"cannot be {shown(word)}: it is KEY=VALUE")
        labels[key] = value
    return labels


def list_runs(
    context: typer.Context,
    state: Annotated[
        list[str] | None,
        typer.Option(help="queued, running, succeeded, failed, cancelled or rejected; repeatable."),
    ] = None,
    label: Labels = None,
    name: Annotated[str, typer.Option(help="Only runs of this name.")] = "",
    oldest_first: Annotated[bool, typer.Option("--oldest-first", help="In this order.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    as_json: Json = False,
) -> None:
    """List runs, newest first."""
    with reported_errors():
        labels = read_labels(label)
        with context.obj.client() as client:
            page = client.list_runs(
                limit, states=state or (), labels=labels, name=name, oldest_first=oldest_first
            )
    for found in page.runs:
        print(display.to_json(found) if as_json else display.run_line(found))


def show(
    context: typer.Context,
    run_id: RunId,
    samples: Annotated[
        bool, typer.Option("--samples", help="With samples, anchors and probes, as JSON.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show one run."""
    with reported_errors(), context.obj.client() as client:
        found = client.get_run(run_id, samples=samples)
    as_json = as_json or samples
    print(display.to_json(found) if as_json else "\n".join(display.run_lines(found)))


def cancel(context: typer.Context, run_id: RunId, as_json: Json = False) -> None:
    """Ask a run to stop before its next step; what it learned until then stays."""
    with reported_errors(), context.obj.client() as client:
        found = client.cancel_run(run_id)
    print(display.to_json(found) if as_json else display.run_line(found))


def delete(context: typer.Context, run_id: RunId) -> None:
    """Delete a run that has ended: its samples and its events. What it learned stays."""
    with reported_errors(), context.obj.client() as client:
        client.delete_run(run_id)
    print(f"deleted {run_id}")
