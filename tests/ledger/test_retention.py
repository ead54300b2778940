"""Old runs go, and one that is too large; whoever appends notices nothing."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.file import FILE_NAME
from apollo_trainer.ledger.retention import Retention
from tests.books import SPEC, Books, finish
from tests.waiting import HANG, slowness


def prune(books: Books) -> None:
    """Retention until it has nothing more to do."""
    connection = sqlite3.connect(books.writer._file.path, isolation_level=None, timeout=HANG)
    while books.writer._retention.apply(connection):
        pass
    connection.close()


def test_events_and_specs_of_old_runs_go_and_their_requests_are_still_known(
    open_books: Any,
) -> None:
    books = open_books(retention=Retention(seconds=0.2, bytes=2**40))
    old = books.accept("old", "request")
    old.append(step=pb.RunEvent.Step(step=1))
    finish(old)
    time.sleep(0.5)
    young = books.accept("young")
    prune(books)
    row = books.ledger.run_of_request("request")
    assert (row.run_id, row.last_sequence, row.pruned_through) == ("old", 3, 3)
    assert books.ledger.spec("old") is None
    assert books.ledger.events("old", 0, 10) == []
    assert books.ledger.spec("young") == SPEC
    assert young.sequence == 1


def test_a_ledger_that_is_too_large_lets_go_of_the_oldest_and_gives_the_room_back(
    open_books: Any, state_dir: Path
) -> None:
    limit = 400_000
    books = open_books(retention=Retention(seconds=1e9, bytes=limit))
    for number in range(12):
        log = books.accept(f"run {number:2}")
        for step in range(1, 601):
            log.append(step=pb.RunEvent.Step(step=step, loss=0.1, grad_norm=0.2, learning_rate=0.3))
        finish(log, 600)
        while not log.kept_on_disk:
            time.sleep(0.005)
    prune(books)
    books.ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    assert (state_dir / FILE_NAME).stat().st_size < limit
    kept = [bool(books.ledger.events(f"run {n:2}", 0, 1)) for n in range(12)]
    assert kept[-1]
    assert kept == sorted(kept)
    assert books.ledger.run("run  0").last_sequence == 602


def test_a_run_at_work_that_is_too_large_lets_go_of_its_oldest_events(open_books: Any) -> None:
    books = open_books(retention=Retention(seconds=1e9, bytes=200_000))
    log = books.accept("a")
    for step in range(1, 10_001):
        log.append(step=pb.RunEvent.Step(step=step, loss=0.1))
    while not log.kept_on_disk:
        time.sleep(0.005)
    prune(books)
    row, kept = books.ledger.run("a"), books.ledger.events("a", 0, 20_000)
    assert 0 < row.pruned_through < row.last_sequence == 10_001
    assert [e.sequence for e in kept] == list(range(row.pruned_through + 1, 10_002))


def test_retention_does_not_hold_events_up(open_books: Any) -> None:
    books = open_books(retention=Retention(seconds=1e9, bytes=300_000))
    for number in range(30):
        log = books.accept(f"run {number}")
        for step in range(1, 401):
            log.append(step=pb.RunEvent.Step(step=step, loss=0.1))
        finish(log)
    log, waits = books.accept("last"), []
    pruner = threading.Thread(target=prune, args=[books])
    pruner.start()
    step = 0
    while pruner.is_alive() or step < 10:
        step += 1
        began = time.monotonic()
        log.append(step=pb.RunEvent.Step(step=step))
        while not log.kept_on_disk:
            time.sleep(0.001)
        waits.append(time.monotonic() - began)
    pruner.join()
    assert sorted(waits)[len(waits) // 2] < 0.2 * slowness(), waits
