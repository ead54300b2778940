"""`apollo runs`, `run`, `wait`, `cancel` and `delete`: runs that the server knows."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from apollo_client.client import ApolloClient
from apollo_client.command import display
from apollo_client.command.display import Json
from apollo_client.command.events import event_line
from apollo_client.command.latest_line import latest_line
from apollo_client.command.outcome import REFUSED, reported_errors
from apollo_client.command.run_display import leave
from apollo_client.command.run_ids import Last, RunId, find_run
from apollo_client.sample_values import shown
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2

_GOING = (training_pb2.RUN_STATE_QUEUED, training_pb2.RUN_STATE_RUNNING)

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
        typer.Option(
            help="queued, running, succeeded, failed, cancelled or rejected; may be repeated."
        ),
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
    run_id: RunId = None,
    last: Last = False,
    samples: Annotated[
        bool, typer.Option("--samples", help="With samples, anchors and probes, as JSON.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show one run."""
    with reported_errors(), context.obj.client() as client:
        found = client.get_run(find_run(client, run_id, last), samples=samples)
    as_json = as_json or samples
    print(display.to_json(found) if as_json else "\n".join(display.run_lines(found)))


def wait(
    context: typer.Context, run_id: RunId = None, last: Last = False, as_json: Json = False
) -> None:
    """Wait until a run has ended, and show it; exit status 0 where it succeeded, else 1.

    Ctrl-C leaves the run at work.
    """
    with reported_errors(), context.obj.client() as client:
        found = client.get_run(find_run(client, run_id, last))
        if found.state in _GOING:
            _follow_quietly(client, found)
            found = client.get_run(found.run_id)
    print(display.to_json(found) if as_json else "\n".join(display.run_lines(found)))
    if found.state != training_pb2.RUN_STATE_SUCCEEDED:
        raise typer.Exit(REFUSED)


def _follow_quietly(client: ApolloClient, run: training_pb2.Run) -> None:
    """Reads a run's events to the last; the latest one is shown on a terminal."""
    name = f"run {run.run_id[:8]}"
    try:
        with latest_line(name) as show:
            for event in client.watch_run(run.run_id, run.last_sequence):
                show(f"{name}  {event_line(event)}")
    except KeyboardInterrupt:
        leave(run.run_id)


def cancel(
    context: typer.Context, run_id: RunId = None, last: Last = False, as_json: Json = False
) -> None:
    """Ask a run to stop before its next step; what it learned until then stays."""
    with reported_errors(), context.obj.client() as client:
        found = client.cancel_run(find_run(client, run_id, last))
    print(display.to_json(found) if as_json else display.run_line(found))


def delete(
    context: typer.Context, run_id: RunId = None, last: Last = False, as_json: Json = False
) -> None:
    """Delete a run that has ended: its samples and its events. What it learned stays."""
    with reported_errors(), context.obj.client() as client:
        found = find_run(client, run_id, last)
        client.delete_run(found)
    print(json.dumps({"deleted": found}) if as_json else f"deleted {found}")
