"""A ledger of an earlier version: what it holds is there, and gets what it lacks."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.file import _STEPS, FILE_NAME, VERSION
from apollo_trainer.ledger.ledger import Choice, canonical, digest_of
from tests.books import SPEC
from tests.ledger.test_feed import at_the_end, keys, read

RUNS = {
    "pruned": pb.RUN_STATE_SUCCEEDED,
    "ended": pb.RUN_STATE_FAILED,
    "waits": pb.RUN_STATE_QUEUED,
}


def write_first_version(path: Path) -> None:
    """Three runs as version 1 kept them: one without its spec and events, one that waits."""
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(f"BEGIN;{_STEPS[0]}PRAGMA user_version = 1;COMMIT;")
        for number, (run_id, state) in enumerate(RUNS.items(), start=1):
            spec = None if run_id == "pruned" else canonical(SPEC)
            connection.execute(
                "INSERT INTO runs (number, run_id, request_id, digest, spec, spec_head, state, "
                "created, steps_total, last_sequence) VALUES (?, ?, ?, ?, ?, x'', ?, 1, 3, 2)",
                (number, run_id, f"request {run_id}", digest_of(SPEC), spec, state),
            )
            for sequence in () if run_id == "pruned" else (1, 2):
                event = pb.RunEvent(run_id=run_id, sequence=sequence).SerializeToString()
                values = (number, sequence, event)
                connection.execute("INSERT INTO events VALUES (?, ?, ?)", values)
    connection.close()


async def test_a_file_of_the_first_version_is_taken_as_it_is(
    open_books: Any, state_dir: Path
) -> None:
    write_first_version(state_dir / FILE_NAME)
    for _ in range(2):
        books = open_books()
        assert [row.run_id for row in books.waiting] == ["waits"]
        assert books.ledger.spec("pruned") is None
        assert books.ledger.spec("waits") == books.ledger.spec("ended") == SPEC
        assert [e.sequence for e in books.ledger.events("ended", 0, 9)] == [1, 2]
        assert books.ledger.run_of_request("request ended").run_id == "ended"
        listed = [row.run_id for row in books.ledger.page(Choice(oldest_first=True), 9)]
        assert listed == list(RUNS)
        told = await read(books, 0, at_the_end(books))
        assert keys(told) == [(run, n) for run in ("ended", "waits") for n in (1, 2)]
        assert [each.revision for each in told] == [1, 2, 3, 4]
        assert books.writer._file.writer.execute("PRAGMA user_version").fetchone() == (VERSION,)
        books.close()
