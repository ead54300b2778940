"""Which run is meant: by its id, by the first characters of one, or as the newest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from apollo_client.client import ApolloClient
from apollo_client.command.display import run_line
from apollo_grpc.errors import InvalidArgument, NotFound
from apollo_grpc.v1 import training_pb2

RunId = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN_ID", help="As 'apollo runs' lists it; its first characters are enough."
    ),
]
Last = Annotated[bool, typer.Option("--last", help="The newest run, instead of RUN_ID.")]
# Characters of an id: with fewer it may be the begin of one.
WHOLE = 32
PAGE, MAX_SHOWN = 1000, 5


def find_run(client: ApolloClient, given: str | None, last: bool = False) -> str:
    """The whole id of the run that is meant; what begins no id is returned as it is.

    Raises InvalidArgument unless one of both is given, and where several ids begin so; NotFound
    where the newest run is asked for and there is none.
    """
    if (given is None) is not last:
        raise InvalidArgument.at("RUN_ID", "or --last is needed, and not both")
    if given is None:
        return _newest(client)
    if not given or len(given) >= WHOLE:
        return given
    found = [run for run in _runs(client) if run.run_id.startswith(given)]
    if len(found) > 1 and not any(run.run_id == given for run in found):
        raise InvalidArgument.at("RUN_ID", _ambiguous(given, found))
    return found[0].run_id if len(found) == 1 else given


def _newest(client: ApolloClient) -> str:
    runs = client.list_runs(1).runs
    if not runs:
        raise NotFound("There is no run; 'apollo train FILE' begins one.")
    return runs[0].run_id


def _runs(client: ApolloClient) -> Iterator[training_pb2.Run]:
    token = ""
    while True:
        page = client.list_runs(PAGE, token)
        yield from page.runs
        if not (token := page.next_page_token):
            return


def _ambiguous(given: str, found: list[training_pb2.Run]) -> str:
    lines = [f"{given} begins the ids of {len(found)} runs; give more of it:"]
    lines += [f"  {run_line(run)}" for run in found[:MAX_SHOWN]]
    if (more := len(found) - MAX_SHOWN) > 0:
        lines.append(f"  and {more} more")
    return "\n".join(lines)
