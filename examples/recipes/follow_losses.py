"""A service that follows the losses of all runs, by whomever, and cancels those that diverge.

Run it beside `apollo up MODEL`:  python examples/recipes/follow_losses.py losses.db

Each loss and the place after it are one transaction: a service that is killed reads on behind the
last loss that it kept, without a gap or a repeat. Ask the file with
`sqlite3 losses.db 'SELECT * FROM losses'`.
"""

from __future__ import annotations

import argparse
import signal
import sqlite3
import sys
from types import FrameType

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError, OutOfRange
from apollo_grpc.v1 import training_pb2 as pb

TABLES = """
CREATE TABLE IF NOT EXISTS losses (run TEXT, step INT, loss REAL, PRIMARY KEY (run, step));
CREATE TABLE IF NOT EXISTS place (id INT PRIMARY KEY CHECK (id = 0), revision INT);
INSERT OR IGNORE INTO place VALUES (0, 0);
"""


class Losses:
    """What is known so far, in a file.

    Args:
        path: of the SQLite file, which is made where it is missing.
    """

    def __init__(self, path: str):
        self._file = sqlite3.connect(path)
        self._file.executescript(TABLES)

    @property
    def revision(self) -> int:
        """Of the last message that was kept; 0 for none."""
        return int(self._file.execute("SELECT revision FROM place").fetchone()[0])

    def keep(self, revision: int, event: pb.RunEvent | None = None) -> None:
        """A message's place, and its loss if it has one: both or neither."""
        with self._file:
            if event and event.HasField("step"):
                row = (event.run_id, event.step.step, event.step.loss)
                self._file.execute("INSERT INTO losses VALUES (?, ?, ?)", row)
            self._file.execute("UPDATE place SET revision = ?", (revision,))

    def lowest(self, run: str) -> float:
        """Of a run that has a loss."""
        found = self._file.execute("SELECT min(loss) FROM losses WHERE run = ?", (run,))
        return float(found.fetchone()[0])


def follow(client: ApolloClient, losses: Losses, rise: float) -> None:
    """Reads on for ever. Raises ApolloError, OutOfRange where events were pruned meanwhile."""
    cancelled = set[str]()
    with client.watch_runs(losses.revision) as stream:
        for message in stream:
            event = message.event
            losses.keep(message.revision, event)
            if not event.HasField("step"):
                continue
            print(f"{event.run_id[:8]} {event.step.step:4} {event.step.loss:.4f}", flush=True)
            diverges = event.step.loss > losses.lowest(event.run_id) + rise
            if diverges and event.run_id not in cancelled:
                # A run that has ended meanwhile stays as it ended.
                client.cancel_run(event.run_id)
                cancelled.add(event.run_id)
                print(f"{event.run_id[:8]} diverges: cancelled", flush=True)


def serve(client: ApolloClient, losses: Losses, rise: float) -> None:
    """The same; goes on behind what was pruned, and says so."""
    while True:
        try:
            follow(client, losses, rise)
        except OutOfRange as error:
            first = int(error.metadata.get("first_revision", "0"))
            if not first:
                raise
            print(error.message, flush=True)
            losses.keep(first - 1)


def leave(number: int, frame: FrameType | None) -> None:
    """Ends well."""
    sys.exit(0)


def main() -> None:
    """Follows until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--rise", type=float, default=2.0, help="nats above a run's lowest loss")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    try:
        # What starts it again, as systemd does, starts it where it was.
        with ApolloClient() as client:
            serve(client, Losses(given.file), given.rise)
    except ApolloError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
