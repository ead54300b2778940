"""`apollo checkpoint`: the model directory, and the ways back to what the model was."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from apollo_client.command import display
from apollo_client.command.display import Json
from apollo_client.command.latest_line import latest_line, progress_line
from apollo_client.command.outcome import INTERRUPTED, REFUSED, reported_errors
from apollo_client.connection import Told
from apollo_grpc.errors import NotFound

app = typer.Typer(no_args_is_help=True, help="Snapshots, undo, export: the disk, and ways back.")
Expect = Annotated[
    int | None,
    typer.Option(
        "--expected-weight-version", "--expect", help="Only if the live weights have this version."
    ),
]
RequestId = Annotated[
    str,
    typer.Option("--request-id", help="Again with the same: follows the first. 'cancel' stops it."),
]


@contextmanager
def left_to_itself() -> Iterator[Told]:
    """Around what begins an operation: Ctrl-C leaves it going, and errors are reported.

    Yields what shows its progress on a terminal.
    """
    try:
        with reported_errors(), latest_line("waiting") as show:
            yield lambda progress: show(progress_line(progress))
    except KeyboardInterrupt:
        where = "'apollo checkpoint operations' shows it, 'apollo checkpoint cancel ID' stops it"
        print(f"\nWhat was begun goes on; {where}.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def verify(
    context: typer.Context,
    full: Annotated[bool, typer.Option("--full", help="Read the files, compare digests.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Compare the live weights too.")] = False,
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Compare the model directory with what the last sync left there; writes nothing."""
    with left_to_itself() as told, context.obj.client() as client:
        result = client.verify(full=full, live=live, progress=told, request_id=request_id)
    print(display.to_json(result) if as_json else "\n".join(display.verify_lines(result)))
    if result.differences:
        raise typer.Exit(REFUSED)


@app.command()
def adopt(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Copy the files of a directory of links or of a hub cache, without what was learned since."""
    with left_to_itself() as told, context.obj.client() as client:
        result = client.adopt(directory.absolute(), told, request_id=request_id)
    print(display.to_json(result) if as_json else display.adopt_line(result))


@app.command()
def sync(
    context: typer.Context,
    expect: Expect = None,
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Bring the model directory up to date with what was learned, as 'apollo sync' does."""
    with left_to_itself() as told, context.obj.client() as client:
        result = client.sync(progress=told, expected_weight_version=expect, request_id=request_id)
    print(display.to_json(result) if as_json else display.sync_line(result))


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Without one it may give way to newer ones.")] = "",
    expect: Expect = None,
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Keep weights and optimizer state as they are now."""
    with left_to_itself() as told, context.obj.client() as client:
        snapshot = client.create_snapshot(
            name, told, expected_weight_version=expect, request_id=request_id
        )
    print(display.to_json(snapshot) if as_json else display.snapshot_line(snapshot))


@app.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the snapshots, newest first."""
    token = ""
    with reported_errors(), context.obj.client() as client:
        while True:
            page = client.list_snapshots(page_token=token)
            for snapshot in page.snapshots:
                print(display.to_json(snapshot) if as_json else display.snapshot_line(snapshot))
            if not (token := page.next_page_token):
                return


@app.command()
def restore(
    context: typer.Context,
    snapshot: Annotated[str, typer.Argument(help="Its id or name, as 'list' lists it.")],
    expect: Expect = None,
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Make a snapshot the live model again, while vLLM serves."""
    with left_to_itself() as told, context.obj.client() as client:
        result = client.restore(
            snapshot, told, expected_weight_version=expect, request_id=request_id
        )
    print(display.to_json(result) if as_json else display.restore_line(result))


@app.command()
def undo(
    context: typer.Context,
    updates: Annotated[int, typer.Argument(help="How many.")] = 1,
    expect: Expect = None,
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Take the last updates back, weights and optimizer state."""
    with left_to_itself(), context.obj.client() as client:
        result = client.undo(updates, expected_weight_version=expect, request_id=request_id)
    print(display.to_json(result) if as_json else display.restore_line(result))


@app.command()
def delete(
    context: typer.Context,
    snapshot: Annotated[str, typer.Argument(help="Its id or name, as 'list' lists it.")],
    as_json: Json = False,
) -> None:
    """Delete a snapshot."""
    with left_to_itself(), context.obj.client() as client:
        client.delete_snapshot(snapshot)
    print(json.dumps({"deleted": snapshot}) if as_json else f"deleted {snapshot}")


@app.command()
def export(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    expect: Expect = None,
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Write the live weights as a new model directory, for vLLM, transformers or a friend."""
    with left_to_itself() as told, context.obj.client() as client:
        result = client.export(
            directory.absolute(), told, expected_weight_version=expect, request_id=request_id
        )
    print(display.to_json(result) if as_json else display.export_line(result))


@app.command()
def operations(
    context: typer.Context,
    state: Annotated[
        list[str] | None,
        typer.Option(help="waiting, running, succeeded, failed or cancelled; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    as_json: Json = False,
) -> None:
    """List what was begun here, by whomever, newest first."""
    with reported_errors(), context.obj.client() as client:
        page = client.operations(limit, states=state or ())
    for found in page.operations:
        print(display.to_json(found) if as_json else display.operation_line(found))


@app.command()
def cancel(
    context: typer.Context,
    operation: Annotated[
        str,
        typer.Argument(metavar="ID", help="As 'operations' lists it, or its --request-id."),
    ],
    as_json: Json = False,
) -> None:
    """Stop an operation; all is then as it was before."""
    with reported_errors(), context.obj.client() as client:
        try:
            state = client.cancel_operation(operation)
        except NotFound:
            state = client.cancel_operation(request_id=operation)
    words = f"{operation}: {state.lower().replace('_', ' ')}"
    print(json.dumps({"operation": operation, "state": state}) if as_json else words)
    if state == "TOO_LATE":
        raise typer.Exit(REFUSED)
