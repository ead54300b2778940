"""`apollo checkpoint`: the model directory, and the ways back to what the model was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_client.command import display
from apollo_client.command.display import Json
from apollo_client.command.outcome import REFUSED, reported_errors

app = typer.Typer(no_args_is_help=True, help="Snapshots, undo, export: the disk, and ways back.")
Expect = Annotated[int | None, typer.Option(help="Only if the live weights have this version.")]
RequestId = Annotated[
    str,
    typer.Option("--request-id", help="Again with the same: attaches; 'cancel' stops it."),
]


@app.command()
def verify(
    context: typer.Context,
    full: Annotated[bool, typer.Option("--full", help="Read the files, compare digests.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Compare the live weights too.")] = False,
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Compare the model directory with what the last sync left there; writes nothing."""
    with reported_errors(), context.obj.client() as client:
        result = client.verify(full=full, live=live, request_id=request_id)
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
    with reported_errors(), context.obj.client() as client:
        result = client.adopt(directory.absolute(), request_id=request_id)
    print(display.to_json(result) if as_json else display.adopt_line(result))


@app.command()
def sync(context: typer.Context, request_id: RequestId = "", as_json: Json = False) -> None:
    """Bring the model directory up to date with what was learned, as 'apollo sync' does."""
    with reported_errors(), context.obj.client() as client:
        result = client.sync(request_id=request_id)
    print(display.to_json(result) if as_json else display.sync_line(result))


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Without one it may give way to newer ones.")] = "",
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Keep weights and optimizer state as they are now."""
    with reported_errors(), context.obj.client() as client:
        snapshot = client.create_snapshot(name, request_id=request_id)
    print(display.to_json(snapshot) if as_json else display.snapshot_line(snapshot))


@app.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """Show the snapshots, newest first."""
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
    snapshot: Annotated[str, typer.Argument(help="Its id, or its name.")],
    expect: Expect = None,
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Make a snapshot the live model again, while vLLM serves."""
    with reported_errors(), context.obj.client() as client:
        result = client.restore(snapshot, expected_weight_version=expect, request_id=request_id)
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
    with reported_errors(), context.obj.client() as client:
        result = client.undo(updates, expected_weight_version=expect, request_id=request_id)
    print(display.to_json(result) if as_json else display.restore_line(result))


@app.command()
def delete(
    context: typer.Context,
    snapshot: Annotated[str, typer.Argument(help="Its id, or its name.")],
) -> None:
    """Delete a snapshot."""
    with reported_errors(), context.obj.client() as client:
        client.delete_snapshot(snapshot)
    print(f"deleted {snapshot}")


@app.command()
def export(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    request_id: RequestId = "",
    as_json: Json = False,
) -> None:
    """Write the live weights as a new model directory, for vLLM, transformers or a friend."""
    with reported_errors(), context.obj.client() as client:
        result = client.export(directory.absolute(), request_id=request_id)
    print(display.to_json(result) if as_json else display.export_line(result))


@app.command()
def cancel(
    context: typer.Context,
    request_id: Annotated[str, typer.Argument(help="As it was given to what is to stop.")],
) -> None:
    """Stop what was begun with --request-id; all is then as it was before."""
    with reported_errors(), context.obj.client() as client:
        state = client.cancel_operation(request_id)
    print(f"{request_id}: {state.lower().replace('_', ' ')}")
    if state == "TOO_LATE":
        raise typer.Exit(REFUSED)
