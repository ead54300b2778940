"""`apollo watch`: events as they happen, of one run or of all."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from apollo_client.command.display import Json, to_json
from apollo_client.command.events import update_line
from apollo_client.command.outcome import reported_errors
from apollo_client.command.record import record
from apollo_client.command.run_display import follow
from apollo_client.command.run_ids import Last, RunId, find_run


def command(
    context: typer.Context,
    run_id: RunId = None,
    last: Last = False,
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

    With RUN_ID or --last: every event of that run from its first, also of one that has ended, and
    then the exit status that 'apollo train' would have had. Ctrl-C leaves the run at work.
    """
    with reported_errors(), context.obj.client() as client:
        wanted = find_run(client, run_id, last) if last or run_id is not None else None
        if to:
            record(client, wanted or "", to, after or 0, as_json)
        elif wanted is not None:
            follow(client.watch_run(wanted, after or 0), as_json, wanted)
        else:
            only = find_run(client, run) if run else ""
            _follow_all(
                client.watch_runs(after) if all_runs else client.watch(only, min_interval), as_json
            )


def _follow_all(told: Any, as_json: bool) -> None:
    try:
        for update in told:
            print(to_json(update) if as_json else update_line(update), flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
