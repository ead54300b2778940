"""One night's training, for cron or a systemd timer: learns what passes its probes, or nothing.

Run it beside `apollo up MODEL`:  python examples/recipes/nightly.py SAMPLES.jsonl PROBES.jsonl

A snapshot is kept first. A run that ends in any other way than accepted is taken back by the server
itself, whatever ended it; a run that is accepted is synced to the model directory. The same night
may be begun again: what was done of it is not done twice.

Exit status: 0 learned, 1 taken back, 2 it could not be tried.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from verdict import Verdict, verdict_of

from apollo_client import ApolloClient, RunOptions, read_probes, read_samples
from apollo_client.facts import RECIPE
from apollo_grpc.errors import ApolloError

NAME = "nightly-"


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("samples", type=Path)
    parser.add_argument("probes", type=Path)
    parser.add_argument("--report", type=Path, default=Path("nightly.jsonl"), help="is added to")
    parser.add_argument("--night", default=date.today().isoformat(), help="default: today's date")
    parser.add_argument("--keep", type=int, default=7, help="snapshots that are kept")
    parser.add_argument("--lr", type=float, default=RECIPE["lr"])
    return parser.parse_args()


def learn(client: ApolloClient, given: argparse.Namespace) -> Verdict:
    """The run of a night, to its end."""
    night = NAME + given.night
    # Samples of any kind and number: until each is learned.
    options = RECIPE | RunOptions(schedule="constant", epochs=60, min_loss=0.1)
    options["probes"] = read_probes(given.probes)
    options["accept_if"] = {"max_failed": 0, "max_lost": 0}
    options["name"], options["lr"] = night, given.lr
    # The same id is the same run: a night that is begun again is not learned twice.
    return verdict_of(client.train(read_samples(given.samples), request_id=night, **options))


def delete_old(client: ApolloClient, keep: int) -> list[str]:
    """Deletes all but the newest snapshots of nights; returns the names of those deleted."""
    pages = client.list_snapshots(page_size=1000)
    names = sorted(each.name for each in pages.snapshots if each.name.startswith(NAME))
    old = names[: max(0, len(names) - keep)]
    for name in old:
        client.delete_snapshot(name)
    return old


def tonight(client: ApolloClient, given: argparse.Namespace) -> dict[str, Any]:
    """Snapshot, run, sync; the report."""
    night = NAME + given.night
    client.create_snapshot(night, request_id=night)
    print(f"snapshot {night}")
    verdict = learn(client, given)
    print("\n".join(verdict.lines()))
    told = asdict(verdict) | {"night": given.night, "state": verdict.state}
    told |= {"end": verdict.end.failure.message, "weight_version": verdict.end.weight_version}
    if verdict.learned:
        told["synced_bytes"] = client.sync().bytes_written
        print(f"synced {told['synced_bytes']:,} bytes")
    told["deleted"] = delete_old(client, given.keep)
    return told


def main() -> int:
    """The exit status."""
    given = arguments()
    try:
        with ApolloClient() as client:
            told = tonight(client, given)
    except ApolloError as error:
        print(error.message, file=sys.stderr)
        told = {"night": given.night, "state": "NOT_TRIED", "end": error.message}
    with given.report.open("a") as report:
        print(json.dumps(told), file=report)
    return {"SUCCEEDED": 0, "NOT_TRIED": 2}.get(told["state"], 1)


if __name__ == "__main__":
    sys.exit(main())
