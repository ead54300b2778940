"""Operations in the ledger: old ones go, and what a kill cut off has failed."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import pytest

from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_trainer.ledger import KeptOperations, Retention, operations
from apollo_trainer.ledger.operations import OperationChange, OperationRow
from tests.books import Books
from tests.waiting import HANG, wait_until


def write(books: Books, *rows: OperationRow) -> None:
    """Writes rows, and waits until they are on disk."""
    told: list[Exception | None] = []
    for row in rows:
        books.writer.keep(OperationChange(row, told.append))
    wait_until(lambda: len(told) == len(rows), "the rows")
    assert not any(told)


def row(name: str, ended: int = 0) -> OperationRow:
    state = pb.OPERATION_STATE_SUCCEEDED if ended else pb.OPERATION_STATE_RUNNING
    return OperationRow(name, name, pb.OPERATION_KIND_SYNC, b"", 1, state, 2, ended)


def names(books: Books) -> list[str]:
    return [found.operation_id for found in KeptOperations(books.ledger).page(2**62, (), 1000)]


def prune(books: Books) -> None:
    connection = sqlite3.connect(books.writer._file.path, isolation_level=None, timeout=HANG)
    while books.writer._retention.apply(connection):
        pass
    connection.close()


def test_operations_that_ended_long_ago_go_and_their_ids_are_free(
    open_books: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "OPERATIONS_A_PASS", 2)
    books = open_books(retention=Retention(seconds=3600, bytes=2**40))
    old = [row(f"old {number}", ended=3) for number in range(5)]
    write(books, *old, row("at work"), row("young", ended=time.time_ns()))
    prune(books)
    assert names(books) == ["young", "at work"]
    write(books, row("old 1", ended=time.time_ns()))
    assert names(books) == ["old 1", "young", "at work"]


def test_of_many_the_newest_are_kept(open_books: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "KEPT_OPERATIONS", 3)
    books = open_books()
    write(books, row("at work"), *(row(f"{n}", ended=time.time_ns()) for n in range(5)))
    prune(books)
    assert names(books) == ["4", "3", "2", "at work"]


def test_a_row_is_changed_in_its_place_and_what_was_cut_off_has_failed(open_books: Any) -> None:
    books = open_books()
    write(books, row("a"), row("b"), row("a", ended=5))
    kept = KeptOperations(books.ledger)
    assert kept.by_id("a") == kept.by_request("a")
    found = kept.by_id("a")
    assert found and (found.number, found.ended) == (1, 5)
    books.close()
    began = time.time_ns()
    again = KeptOperations(open_books().ledger)
    assert again.by_id("a") == found
    cut_off = again.by_id("b")
    assert cut_off and cut_off.ended >= began
    told = cut_off.to_operation()
    assert (told.state, told.failure.reason) == (pb.OPERATION_STATE_FAILED, "OPERATION_INTERRUPTED")
    assert "begins it anew" in told.failure.message
