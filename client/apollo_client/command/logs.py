"""`apollo logs`: the last events of a run in plain words."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from apollo_client.client import ApolloClient
from apollo_client.command.display import Json, to_json
from apollo_client.command.events import event_line
from apollo_client.command.outcome import reported_errors
from apollo_client.command.run_ids import Last, RunId, find_run
from apollo_grpc.errors import OutOfRange
from apollo_grpc.v1 import training_pb2


def command(
    context: typer.Context,
    run_id: RunId = None,
    last: Last = False,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=1_000_000, help="At most so many.")
    ] = 20,
    as_json: Json = False,
) -> None:
    """Show the last events of a run, with their times; 'apollo watch RUN_ID' follows it."""
    with reported_errors(), context.obj.client() as client:
        run = client.get_run(find_run(client, run_id, last))
        for event in events_so_far(client, run, run.last_sequence - limit):
            print(to_json(event) if as_json else _timed(event))


def events_so_far(
    client: ApolloClient, run: training_pb2.Run, after: int = 0
) -> Iterator[training_pb2.RunEvent]:
    """The events after a sequence that there were when the server told of the run.

    Those that it pruned are left out, which is told on stderr. Raises OutOfRange where it pruned
    all of them.
    """
    try:
        yield from _read(client, run, max(after, 0))
    except OutOfRange as error:
        if not (first := error.metadata.get("first_kept")):
            raise
        print(f"apollo: the server has no events before {first} any more", file=sys.stderr)
        yield from _read(client, run, int(first) - 1)


def _read(
    client: ApolloClient, run: training_pb2.Run, after: int
) -> Iterator[training_pb2.RunEvent]:
    with client.watch_run(run.run_id, after) as stream:
        for event in stream:
            yield event
            if event.sequence >= run.last_sequence:
                return


def _timed(event: training_pb2.RunEvent) -> str:
    when = event.event_time.ToDatetime().isoformat(" ", "milliseconds")
    return f"{when} UTC  {event_line(event)}"
