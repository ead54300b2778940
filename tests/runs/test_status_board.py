"""The status, and subscribers that never slow down whoever publishes."""

from __future__ import annotations

import asyncio
import threading
import time

from apollo_grpc.v1 import status_pb2, training_pb2
from apollo_trainer.runs.status_board import SUBSCRIBER_QUEUE, StatusBoard, Subscriber


def new_board() -> StatusBoard:
    return StatusBoard("1.2.3", "no engine yet")


def step(number: int) -> training_pb2.RunEvent:
    return training_pb2.RunEvent(run_id="r", sequence=number)


async def drain(subscriber: Subscriber) -> list[status_pb2.WatchStatusResponse]:
    updates = []
    while update := await subscriber.next(0.05):
        updates.append(update)
    return updates


def test_a_new_board_is_detached_and_says_why() -> None:
    status = new_board().snapshot()
    assert status.attachment == status_pb2.ATTACHMENT_STATE_DETACHED
    assert status.attachment_detail == "no engine yet"
    assert status.server_version == "1.2.3"


def test_uptime_goes_on_by_itself() -> None:
    board = new_board()
    first = board.snapshot().uptime.ToNanoseconds()
    assert 0 <= first < board.snapshot().uptime.ToNanoseconds()


def test_a_snapshot_is_a_copy() -> None:
    board = new_board()
    board.snapshot().model = "changed"
    assert board.snapshot().model == ""


async def test_the_first_update_is_the_status_now_and_the_next_the_changes() -> None:
    board = new_board()
    board.update(queue_length=3)
    subscriber = board.subscribe()
    board.update(queue_length=4)
    board.publish(step(1))
    first, second, third = await drain(subscriber)
    assert first.status.queue_length == 3
    assert second.status.queue_length == 4
    assert third.event.sequence == 1
    assert first.dropped == second.dropped == third.dropped == 0


async def test_an_update_that_changes_nothing_is_not_told() -> None:
    board = new_board()
    subscriber = board.subscribe()
    board.update(queue_length=0)
    board.update(lambda status: None)
    assert len(await drain(subscriber)) == 1


async def test_a_slow_subscriber_loses_the_oldest_and_is_told_how_many() -> None:
    board = new_board()
    slow, quick = board.subscribe(), board.subscribe()
    assert len(await drain(quick)) == 1
    for number in range(SUBSCRIBER_QUEUE):
        board.publish(step(number))
    kept = await drain(quick)
    assert [u.event.sequence for u in kept] == list(range(SUBSCRIBER_QUEUE))
    assert sum(u.dropped for u in kept) == 0
    for number in range(5):
        board.publish(step(1000 + number))
    updates = await drain(slow)
    assert len(updates) == SUBSCRIBER_QUEUE
    assert updates[0].event.sequence == 5
    assert updates[-1].event.sequence == 1004
    assert [u.dropped for u in updates] == [6] + [0] * (SUBSCRIBER_QUEUE - 1)


async def test_publishing_from_a_thread_never_waits_for_a_loop_that_is_busy() -> None:
    board = new_board()
    subscribers = [board.subscribe() for _ in range(4)]

    def publish_many() -> None:
        for number in range(2000):
            board.publish(step(number))

    thread = threading.Thread(target=publish_many)
    thread.start()
    # The loop does nothing meanwhile: whoever waited for it would wait for ever.
    await asyncio.sleep(0)
    thread.join(timeout=10)
    assert not thread.is_alive()
    for subscriber in subscribers:
        updates = await drain(subscriber)
        assert len(updates) + sum(u.dropped for u in updates) == 2001


async def test_a_waiting_subscriber_is_woken_at_once() -> None:
    board = new_board()
    subscriber = board.subscribe()
    await subscriber.next(1)
    threading.Timer(0.02, board.publish, [step(7)]).start()
    began = time.monotonic()
    update = await subscriber.next(10)
    assert update is not None
    assert update.event.sequence == 7
    assert time.monotonic() - began < 5


async def test_next_gives_up_in_time() -> None:
    subscriber = new_board().subscribe()
    await subscriber.next(1)
    assert await subscriber.next(0.01) is None
    assert await subscriber.next(0) is None


async def test_after_unsubscribing_nothing_comes() -> None:
    board = new_board()
    subscriber = board.subscribe()
    await subscriber.next(1)
    board.unsubscribe(subscriber)
    board.publish(step(1))
    assert await subscriber.next(0.01) is None


def test_a_subscriber_whose_loop_has_ended_does_no_harm() -> None:
    board = new_board()

    async def subscribe() -> None:
        board.subscribe()

    asyncio.run(subscribe())
    board.publish(step(1))
    board.update(queue_length=1)
    assert board.snapshot().queue_length == 1


async def test_a_closed_board_ends_its_subscribers_after_what_they_had_not_read() -> None:
    board = StatusBoard("test", "no engine")
    subscriber = board.subscribe()
    board.update(queue_length=3)
    board.close()
    read = []
    while not subscriber.ended:
        read.append(await subscriber.next(60))
    assert [update.status.queue_length for update in read] == [0, 3]
    assert await subscriber.next(60) is None
