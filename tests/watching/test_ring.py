"""Updates are made once for all who watch, kept within bounds, and lost by none in silence."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import apollo_trainer.engine.status_board as board_module
import apollo_trainer.watching.ring as ring_module
from apollo_grpc.v1 import status_pb2, training_pb2
from apollo_trainer.engine.status_board import KEPT_EVENTS, StatusBoard
from apollo_trainer.watching.ring import MAX_BYTES, Ring, Update, Watcher
from tests.waiting import HANG


def new_board() -> StatusBoard:
    return StatusBoard("1.2.3", "no engine yet")


def step(number: int, run_id: str = "r", size: int = 0) -> training_pb2.RunEvent:
    event = training_pb2.RunEvent(run_id=run_id, sequence=number)
    event.warning.message = "x" * size
    return event


async def looked(ring: Ring) -> None:
    """Lets the ring take in what was published so far, a status that waits among it."""
    await asyncio.sleep(0)
    ring._look(at_once=True)


def taken(watcher: Watcher) -> list[Update]:
    found = []
    while update := watcher.take():
        found.append(update)
    return found


def read(updates: list[Update]) -> list[status_pb2.WatchStatusResponse]:
    return [status_pb2.WatchStatusResponse.FromString(update.data) for update in updates]


def sequences(updates: list[Update]) -> list[int]:
    return [update.event.sequence for update in read(updates) if update.HasField("event")]


async def test_the_first_update_is_the_status_now_and_the_next_what_comes() -> None:
    board = new_board()
    board.update(queue_length=3)
    ring = Ring(board)
    watcher = ring.subscribe()
    board.publish(step(1))
    board.update(queue_length=4)
    await looked(ring)
    first, second, third = read(taken(watcher))
    assert (first.status.queue_length, third.status.queue_length) == (3, 4)
    assert second.event.sequence == 1
    assert watcher.lost == 0


async def test_a_change_that_leaves_the_status_as_it_was_is_not_told() -> None:
    board = new_board()
    ring = Ring(board)
    watcher = ring.subscribe()
    board.update(queue_length=0)
    board.update(lambda status: None)
    await looked(ring)
    assert len(taken(watcher)) == 1


async def test_statuses_are_made_at_most_so_often_and_the_last_one_always() -> None:
    board = new_board()
    ring = Ring(board)
    watcher, began, told = ring.subscribe(), time.monotonic(), []
    for number in range(1, 400):
        board.update(queue_length=number)
        told += taken(watcher)
        await asyncio.sleep(0.001)
    most = 3 + (time.monotonic() - began) / ring_module.STATUS_SECONDS
    while not told or read(told)[-1].status.queue_length != 399:
        await watcher.wait(HANG)
        told += taken(watcher)
    assert 3 < len(told) <= most


@pytest.mark.parametrize(("watchers", "seconds"), [(1, 0.05), (8, 0.05), (400, 2.0)])
async def test_the_more_watch_the_longer_it_is_between_two_statuses(
    monkeypatch: pytest.MonkeyPatch, watchers: int, seconds: float
) -> None:
    board, rests = new_board(), []
    ring, loop = Ring(board), asyncio.get_running_loop()
    for _ in range(watchers):
        ring.subscribe()
    ring._resting = False
    monkeypatch.setattr(loop, "call_later", lambda rest, _: rests.append(rest))
    board.update(queue_length=1)
    ring._look()
    assert rests == [seconds]


@pytest.mark.parametrize("seconds", [1.0, 0.01])
async def test_watchers_are_woken_one_after_the_other_and_all_of_them(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(ring_module, "ROUND_SECONDS", seconds)
    board, found = new_board(), dict[int, list[int]]()
    ring = Ring(board)
    watchers = [ring.subscribe() for _ in range(100)]

    async def watch(number: int) -> None:
        watcher, found[number] = watchers[number], []
        taken(watcher)
        while len(found[number]) < 2:
            await watcher.wait(HANG)
            found[number] += sequences(taken(watcher))

    loop, pauses = asyncio.get_running_loop(), list[Callable[[], None]]()
    later = loop.call_later

    def end_by_hand(rest: float, callback: Any, *args: Any) -> Any:
        return pauses.append(callback) if callback == ring._wake else later(rest, callback, *args)

    monkeypatch.setattr(loop, "call_later", end_by_hand)
    watching = [asyncio.create_task(watch(number)) for number in range(100)]
    await asyncio.sleep(0)
    board.publish(step(1))
    # The loop hears of it, wakes the first, and these run.
    for _ in range(4):
        await asyncio.sleep(0)
    assert sum(map(bool, found.values())) == (1 if seconds == 1 else 10)
    board.publish(step(2))
    while not all(task.done() for task in watching):
        while pauses:
            pauses.pop()()
        await asyncio.sleep(0)
    await asyncio.gather(*watching)
    assert found == {number: [1, 2] for number in range(100)}


async def test_who_stops_waiting_leaves_nothing_behind() -> None:
    ring = Ring(new_board())
    watcher = ring.subscribe()
    taken(watcher)
    for _ in range(3):
        await watcher.wait(0.001)
    assert not ring._waiting


async def test_the_loop_is_woken_once_however_many_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    board, woken = new_board(), []
    ring, loop = Ring(board), asyncio.get_running_loop()
    watchers = [ring.subscribe() for _ in range(50)]
    original = loop.call_soon_threadsafe
    monkeypatch.setattr(
        loop, "call_soon_threadsafe", lambda *given: woken.append(1) or original(*given)
    )
    for number in range(10):
        board.publish(step(number))
        board.update(queue_length=number)
    assert len(woken) == 1
    await asyncio.sleep(0)
    assert all(sequences(taken(watcher)) == list(range(10)) for watcher in watchers)
    # A status was told just now: the next change waits for the loop to look by itself.
    board.update(queue_length=77)
    assert len(woken) == 1
    watchers[0].take()
    await watchers[0].wait(HANG)
    assert read(taken(watchers[0]))[-1].status.queue_length == 77


async def test_all_watchers_get_the_same_bytes_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = ring_module.pb.WatchStatusResponse

    def counted(**fields: Any) -> Any:
        made.append(fields)
        return original(**fields)

    board = new_board()
    ring = Ring(board)
    watchers = [ring.subscribe() for _ in range(20)]
    monkeypatch.setattr(ring_module.pb, "WatchStatusResponse", counted)
    for number in range(5):
        board.publish(step(number))
    await looked(ring)
    assert len(made) == 5
    alike = [taken(watcher)[1:] for watcher in watchers]
    assert all(mine is other for each in alike for mine, other in zip(each, alike[0], strict=True))


async def test_a_slow_watcher_loses_the_oldest_and_they_are_counted() -> None:
    board = new_board()
    ring = Ring(board)
    slow, quick = ring.subscribe(), ring.subscribe()
    for number in range(KEPT_EVENTS):
        board.publish(step(number))
    await looked(ring)
    assert sequences(taken(quick)) == list(range(KEPT_EVENTS))
    for number in range(KEPT_EVENTS, KEPT_EVENTS + 5):
        board.publish(step(number))
    await looked(ring)
    assert sequences(taken(quick)) == list(range(KEPT_EVENTS, KEPT_EVENTS + 5))
    assert quick.lost == 0
    assert sequences(taken(slow)) == list(range(5, KEPT_EVENTS + 5))
    assert slow.lost == 5


async def test_large_updates_are_bounded_by_their_bytes() -> None:
    board = new_board()
    ring, size = Ring(board), MAX_BYTES // 10
    watcher = ring.subscribe()
    for number in range(30):
        board.publish(step(number, size=size))
        await looked(ring)
    assert sum(len(update.data) for update in ring._updates) <= MAX_BYTES
    assert sequences(taken(watcher)) == list(range(21, 30))
    assert watcher.lost == 21


async def test_one_that_is_larger_than_the_bound_is_told_alone() -> None:
    board = new_board()
    ring = Ring(board)
    watcher = ring.subscribe()
    board.publish(step(1, size=MAX_BYTES + 1))
    await looked(ring)
    assert sequences(taken(watcher)) == [1]


async def test_publishing_from_a_thread_never_waits_for_a_loop_that_is_busy() -> None:
    board, count = new_board(), KEPT_EVENTS + 1000
    ring = Ring(board)
    watchers = [ring.subscribe() for _ in range(4)]

    def publish_many() -> None:
        for number in range(count):
            board.publish(step(number))

    thread = threading.Thread(target=publish_many)
    thread.start()
    # The loop does nothing meanwhile: whoever waited for it would wait for ever.
    thread.join(timeout=HANG)
    assert not thread.is_alive()
    await looked(ring)
    for watcher in watchers:
        assert len(taken(watcher)) + watcher.lost == count + 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["publish", "look", "one", "other"]), st.integers(1, 20)),
        max_size=40,
    )
)
def test_what_a_watcher_takes_and_what_it_lost_is_all_there_was(
    moves: list[tuple[str, int]],
) -> None:
    async def play() -> None:
        board = new_board()
        ring = Ring(board)
        watchers = {name: ring.subscribe() for name in ("one", "other")}
        got: dict[str, list[int]] = {name: [] for name in watchers}
        published = 0
        for move, count in [*moves, ("look", 1), ("one", 999), ("other", 999)]:
            for _ in range(count):
                if move == "publish":
                    board.publish(step(published))
                    published += 1
                elif move != "look" and (update := watchers[move].take()):
                    got[move] += sequences([update])
            if move == "look":
                ring._look()
        for name, watcher in watchers.items():
            assert got[name] == sorted(set(got[name]))
            assert len(got[name]) + watcher.lost == published
            assert got[name][-1:] == list(range(published))[-1:]

    with pytest.MonkeyPatch.context() as patch:
        for module in (board_module, ring_module):
            patch.setattr(module, "KEPT_EVENTS", 16)
        asyncio.run(play())


async def test_a_waiting_watcher_is_woken_at_once() -> None:
    board = new_board()
    watcher = Ring(board).subscribe()
    taken(watcher)
    threading.Timer(0.02, board.publish, [step(7)]).start()
    began = time.monotonic()
    await watcher.wait(HANG)
    assert sequences(taken(watcher)) == [7]
    assert time.monotonic() - began < 5


async def test_waiting_gives_up_in_time() -> None:
    watcher = Ring(new_board()).subscribe()
    taken(watcher)
    await watcher.wait(0.01)
    await watcher.wait(0)
    assert watcher.take() is None


async def test_when_the_last_watcher_has_left_nothing_is_kept_for_it() -> None:
    board = new_board()
    ring = Ring(board)
    ring.subscribe()
    ring.unsubscribe()
    board.publish(step(1))
    board.update(queue_length=2)
    assert board.take_events() == ([], 0)
    again = ring.subscribe()
    (first,) = read(taken(again))
    assert first.status.queue_length == 2


def test_a_ring_whose_loop_has_ended_does_no_harm() -> None:
    board = new_board()

    async def subscribe() -> None:
        Ring(board).subscribe()

    asyncio.run(subscribe())
    board.publish(step(1))
    board.update(queue_length=1)
    assert board.snapshot().queue_length == 1


async def test_a_closed_ring_ends_its_watchers_after_what_they_had_not_taken() -> None:
    board = new_board()
    ring = Ring(board)
    watcher = ring.subscribe()
    board.update(queue_length=3)
    ring.close()
    assert not watcher.ended
    assert [update.status.queue_length for update in read(taken(watcher))] == [0, 3]
    assert watcher.ended
    await watcher.wait(HANG)
