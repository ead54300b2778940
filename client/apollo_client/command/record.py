"""`apollo watch RUN_ID --to`: a run's figures go to a sink, and the run is shown as ever."""

from __future__ import annotations

from contextlib import closing

from apollo_client.client import ApolloClient
from apollo_client.command.run_display import follow
from apollo_client.sinks import open_sink, recorded, require_target
from apollo_grpc.errors import InvalidArgument


def record(client: ApolloClient, run_id: str, target: str, after: int, as_json: bool) -> None:
    """Writes a run's figures until its end, from where the sink ended; ends as `follow` does.

    Args:
        target: as `open_sink` takes it. It is made once the run is known to the server.
        after: what `--after` says, which must be nothing.
    """
    require_target(target)
    if not run_id:
        raise InvalidArgument.at(
            "--to", "needs RUN_ID before it, or --last; 'apollo runs' lists them"
        )
    if after:
        raise InvalidArgument.at("--after", "cannot stand beside --to, which says where to go on")
    run = client.get_run(run_id)
    with closing(open_sink(target, run.run_id)) as sink:
        stream = client.watch_run(run.run_id, sink.after)
        follow(recorded(stream, sink), as_json, run.run_id)
