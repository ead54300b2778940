"""`apollo dashboard`: a page about the server in this machine's browser."""

from __future__ import annotations

from typing import Annotated

import typer

from apollo_client.command.outcome import reported_errors
from apollo_client.dashboard import Dashboard


def command(
    context: typer.Context,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; default any that is free.")
    ] = 0,
) -> None:
    """Show runs, engine and snapshots in a browser on this machine, until Ctrl-C. Read only.

    Whoever has the address that is printed can read what the page shows, probes and their answers
    included.
    """
    with reported_errors(), context.obj.client() as client:
        client.status()
        with Dashboard(client, port) as dashboard:
            print(f"open {dashboard.url} (Ctrl-C ends it)", flush=True)
            try:
                dashboard.serve_forever()
            except KeyboardInterrupt:
                raise typer.Exit(0) from None
