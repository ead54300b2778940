"""The events of all runs: each once, in the order in which they reached the disk, whoever reads."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest

from apollo_grpc.errors import OutOfRange, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger import feed as feed_module
from apollo_trainer.ledger.events import EventLog
from apollo_trainer.ledger.ledger import Ledger
from apollo_trainer.ledger.retention import Retention
from tests.books import Books, finish
from tests.ledger.test_retention import prune
from tests.waiting import HANG

Told = list[pb.WatchRunsResponse]
Done = Callable[[Told], bool]


async def read(books: Books, after: int | None, done: Done) -> Told:
    """What a reader is told until it has enough."""
    told: Told = []
    async with asyncio.timeout(HANG):
        async for data in books.writer.feed.follow(after):
            told.append(pb.WatchRunsResponse.FromString(data))
            if done(told):
                break
    return told


def at_the_end(books: Books) -> Done:
    return lambda told: told[-1].revision == books.writer.feed.newest


def step(log: EventLog, number: int) -> None:
    log.append(step=pb.RunEvent.Step(step=number, loss=number / 10))


def keys(told: Told) -> list[tuple[str, int]]:
    return [(each.event.run_id, each.event.sequence) for each in told if each.HasField("event")]


def settle(*logs: EventLog) -> None:
    while not all(log.kept_on_disk for log in logs):
        time.sleep(0.002)


def on_disk(books: Books) -> list[tuple[str, int]]:
    """Every event that is kept, by revision."""
    found = books.ledger.fetch("SELECT event FROM events ORDER BY revision")
    events = [pb.RunEvent.FromString(event) for (event,) in found]
    return [(event.run_id, event.sequence) for event in events]


def begin_two(books: Books) -> list[EventLog]:
    """Two runs whose events came in turn."""
    logs = [books.accept("a"), books.accept("b")]
    for number in (1, 2, 3):
        for log in logs:
            step(log, number)
            settle(log)
    return logs


async def test_runs_are_told_in_the_order_in_which_their_events_reached_the_disk(
    open_books: Any,
) -> None:
    books = open_books()
    begin_two(books)
    told = await read(books, 0, at_the_end(books))
    assert keys(told) == [(run, n) for n in (1, 2, 3, 4) for run in ("a", "b")]
    revisions = [each.revision for each in told]
    assert revisions == sorted(set(revisions))
    for given, later in zip(told, [told[n:] for n in range(1, len(told))], strict=False):
        assert await read(books, given.revision, at_the_end(books)) == later


async def test_a_reader_from_now_on_is_told_the_revision_of_now_first(open_books: Any) -> None:
    books = open_books()
    (log, _), newest = begin_two(books), books.writer.feed.newest
    reading = asyncio.create_task(read(books, None, lambda told: len(told) == 3))
    while not books.writer.feed.readers:
        await asyncio.sleep(0.001)
    step(log, 4)
    await asyncio.to_thread(settle, log)
    step(log, 5)
    first, *later = await reading
    assert (first.revision, first.HasField("event")) == (newest, False)
    assert keys(later) == [("a", 5), ("a", 6)]
    assert later[0].revision > newest


async def test_a_revision_is_never_given_twice_also_after_a_restart(open_books: Any) -> None:
    books = open_books()
    logs = begin_two(books)
    for log in logs:
        finish(log)
    settle(*logs)
    newest = books.writer.feed.newest
    books.delete("b")
    books.close()
    books = open_books()
    assert books.writer.feed.newest == newest
    settle(books.accept("c"))
    told = await read(books, newest, at_the_end(books))
    assert keys(told) == [("c", 1)]
    assert told[0].revision > newest


async def test_many_readers_at_the_end_share_what_is_read_once(
    open_books: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    books, asked = open_books(), list[int]()
    log, revised = books.accept("a"), Ledger.revised

    def counted(ledger: Ledger, after: int, limit: int) -> Any:
        asked.append(after)
        return revised(ledger, after, limit)

    monkeypatch.setattr(Ledger, "revised", counted)
    readers = [
        asyncio.create_task(read(books, None, lambda told: len(told) == 21)) for _ in "x" * 64
    ]
    while len(books.writer.feed.readers) < 64:
        await asyncio.sleep(0.001)
    for number in range(1, 21):
        step(log, number)
        await asyncio.to_thread(settle, log)
    told = await asyncio.gather(*readers)
    assert all(each == told[0] for each in told)
    # Each commit is read, and found to be all there is.
    assert len(asked) <= 40


@pytest.mark.parametrize("kept", [2, 1024])
async def test_a_slow_reader_loses_nothing_when_memory_lets_go(
    open_books: Any, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(feed_module, "KEPT_EVENTS", kept)
    books = open_books()
    log, told = books.accept("a"), Told()
    async with asyncio.timeout(HANG):
        stream = books.writer.feed.follow(0)
        for number in range(1, 41):
            step(log, number)
            await asyncio.to_thread(settle, log)
            if number % 7 == 0:
                told.append(pb.WatchRunsResponse.FromString(await anext(stream)))
        while len(told) < 41:
            told.append(pb.WatchRunsResponse.FromString(await anext(stream)))
    assert keys(told) == on_disk(books)
    assert len(books.writer.feed._recent) <= kept


async def test_what_was_pruned_is_out_of_range_and_says_where_all_is_kept(open_books: Any) -> None:
    books = open_books(retention=Retention(seconds=0.01, bytes=2**40))
    logs = begin_two(books)
    finish(logs[0])
    settle(logs[0])
    lost = books.writer.feed.newest
    step(logs[1], 4)
    settle(logs[1])
    await asyncio.sleep(0.02)
    prune(books)
    for after in (1, lost - 1):
        with pytest.raises(OutOfRange) as refused:
            await read(books, after, lambda told: True)
        assert refused.value.reason == "EVENTS_PRUNED"
        assert refused.value.metadata == {"first_revision": str(lost + 1)}
    assert keys(await read(books, lost, at_the_end(books))) == [("b", 5)]
    # Whoever asks for all that is kept gets that.
    assert keys(await read(books, 0, at_the_end(books))) == [("b", n) for n in range(1, 6)]


async def test_a_reader_that_is_overtaken_by_retention_is_told(
    open_books: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "PAGE", 2)
    books = open_books(retention=Retention(seconds=0.01, bytes=2**40))
    log = books.accept("a")
    step(log, 1)
    settle(log)
    stream = books.writer.feed.follow(0)
    await anext(stream)
    finish(log)
    settle(log)
    await asyncio.sleep(0.02)
    prune(books)
    books.writer.feed.forget()
    with pytest.raises(OutOfRange):
        for _ in range(3):
            await anext(stream)


async def test_a_revision_that_was_not_given_yet_is_out_of_range(open_books: Any) -> None:
    books = open_books()
    begin_two(books)
    newest = books.writer.feed.newest
    with pytest.raises(OutOfRange) as refused:
        await read(books, newest + 1, lambda told: True)
    assert refused.value.metadata == {"newest_revision": str(newest)}
    (told,) = await read(books, newest, lambda told: True)
    assert (told.revision, told.HasField("event")) == (newest, False)


async def test_readers_end_with_the_server_once_they_have_read_all(open_books: Any) -> None:
    books, told = open_books(), list[bytes]()
    log = books.accept("a")

    async def until_the_end() -> None:
        async for data in books.writer.feed.follow(0):
            told.append(data)

    reading = asyncio.create_task(until_the_end())
    while not told:
        await asyncio.sleep(0.001)
    step(log, 1)
    await asyncio.to_thread(books.writer.stop)
    with pytest.raises(Unavailable):
        await reading
    assert len(told) == 2


def test_a_page_of_large_events_is_short(open_books: Any) -> None:
    books = open_books()
    log = books.accept("a")
    for _ in range(20):
        log.append(evaluated=pb.RunEvent.Evaluated(losses=[1.0] * 10_000))
    settle(log)
    page = books.ledger.revised(0, 512)
    assert 1 < len(page) <= 1 + -(-feed_module.PAGE_BYTES // 80_000)
    assert keys_of(books, page[-1][0]) == len(page)


def keys_of(books: Books, revision: int) -> int:
    with sqlite3.connect(books.writer._file.path) as connection:
        found = connection.execute("SELECT COUNT(*) FROM events WHERE revision <= ?", (revision,))
        return int(found.fetchone()[0])
