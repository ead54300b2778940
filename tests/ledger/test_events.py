"""A run's events: in order, without gaps, for every follower at its own pace."""

from __future__ import annotations

import asyncio
import threading

from apollo_grpc.times import duration
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.events import EventLog
from tests.waiting import HANG

SUCCEEDED = pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED)


def new_log() -> EventLog:
    return EventLog("run", lambda event: None)


def fill(log: EventLog, steps: int = 50) -> None:
    """What the training thread appends in a run."""
    log.append(queued=pb.RunEvent.Queued())
    for number in range(steps):
        log.append(step=pb.RunEvent.Step(step=number + 1))
    log.append(finished=SUCCEEDED)


async def follow(log: EventLog, after: int = 0) -> list[int]:
    async with asyncio.timeout(HANG):
        return [event.sequence async for event in log.follow(after)]


async def test_events_are_numbered_from_one_without_gaps_and_published() -> None:
    published: list[pb.RunEvent] = []
    log = EventLog("run", published.append)
    fill(log)
    assert await follow(log) == [event.sequence for event in published] == list(range(1, 53))
    assert {event.run_id for event in published} == {"run"}
    times = [event.event_time.ToNanoseconds() for event in published]
    assert times == sorted(times)
    assert times[0] > 0


async def test_a_late_follower_gets_everything_and_another_the_rest() -> None:
    log = new_log()
    fill(log, steps=3)
    assert log.ended
    assert await follow(log) == [1, 2, 3, 4, 5]
    assert await follow(log, after=3) == [4, 5]


async def test_followers_of_a_running_run_all_get_all_of_it() -> None:
    log = new_log()
    followers = [asyncio.create_task(follow(log, after)) for after in (0, 0, 0, 10)]
    await asyncio.sleep(0)
    thread = threading.Thread(target=fill, args=[log, 500])
    thread.start()
    got = await asyncio.gather(*followers)
    thread.join()
    whole = list(range(1, 503))
    assert got == [whole, whole, whole, whole[10:]]


async def test_a_follower_waits_for_an_event_that_has_not_happened() -> None:
    log = new_log()
    follower = asyncio.create_task(follow(log))
    await asyncio.sleep(0.02)
    log.append(queued=pb.RunEvent.Queued())
    await asyncio.sleep(0.02)
    assert not follower.done()
    assert not log.ended
    log.append(finished=SUCCEEDED)
    assert await follower == [1, 2]


async def test_a_slow_follower_loses_nothing() -> None:
    log, got = new_log(), []
    fill(log, steps=5)
    async for event in log.follow():
        got.append(event.sequence)
        await asyncio.sleep(0.002)
    assert got == [1, 2, 3, 4, 5, 6, 7]


async def test_a_follower_that_leaves_is_forgotten_and_disturbs_no_one() -> None:
    log = new_log()
    leaving, staying = (asyncio.create_task(follow(log)) for _ in range(2))
    await asyncio.sleep(0.01)
    assert len(log.readers) == 2
    leaving.cancel()
    await asyncio.sleep(0.01)
    assert len(log.readers) == 1
    fill(log, steps=1)
    assert await staying == [1, 2, 3]
    assert not log.readers


def test_a_follower_whose_loop_has_ended_does_not_stop_the_run() -> None:
    log = new_log()

    async def leave_in_the_middle() -> None:
        follower = log.follow()
        log.append(queued=pb.RunEvent.Queued())
        await anext(follower)
        log.readers._changed[asyncio.Event()] = asyncio.get_running_loop()

    asyncio.run(leave_in_the_middle())
    assert log.readers
    log.append(finished=SUCCEEDED)
    assert log.ended


def test_seconds_become_durations() -> None:
    assert duration(1.5).ToMilliseconds() == 1500
    assert duration(0).ToNanoseconds() == 0
