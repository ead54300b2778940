"""Work over threads ends with every result in its place, or with what failed first."""

from __future__ import annotations

import threading

import pytest

from apollo_trainer.checkpoints.disk import threads as spreading
from apollo_trainer.checkpoints.disk.threads import (
    background_threads,
    in_batches,
    spread,
    spread_by_size,
    threads_for,
)
from tests.waiting import HANG


@pytest.mark.parametrize("threads", [1, 3])
def test_results_are_in_the_order_of_the_items(threads: int) -> None:
    assert list(spread(lambda n: n * n, range(20), threads)) == [n * n for n in range(20)]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_failed_is_raised_and_no_thread_works_any_more(threads: int) -> None:
    begun = []
    fails = threading.Event()

    def work(n: int) -> None:
        begun.append(n)
        if n == 4:
            fails.set()
            raise ValueError("the fourth")
        assert n < 4 or fails.wait(HANG)

    before = threading.active_count()
    with pytest.raises(ValueError, match="the fourth"):
        spread(work, range(5000), threads)
    assert threading.active_count() == before
    assert len(begun) < 5000


def test_small_items_go_together_and_large_ones_alone_in_order() -> None:
    sizes = [2**24, 2**23, 2**22, 2**22, 5, 0, 2**24]
    assert in_batches(sizes, lambda size: size) == [
        [2**24],
        [2**23],
        [2**22, 2**22],
        [5, 0],
        [2**24],
    ]
    assert in_batches([], lambda size: size) == []


def test_a_huge_tensor_gets_all_threads_and_small_ones_one_each() -> None:
    sizes = {"small": 2**20, "huge": 2**30, "none": 0, "other": 2**21}
    given = {}

    def work(name: str, threads: int) -> str:
        given[name] = threads
        return name.upper()

    results = spread_by_size(work, sizes, 4)
    assert results == {name: name.upper() for name in sizes}
    assert list(results) == list(sizes)
    assert given == {"small": 1, "huge": 4, "none": 1, "other": 1}
    assert spread_by_size(work, {}, 4) == {}


def test_little_work_stays_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, waited_for, background in ((2, 2, 1), (64, 8, 2), (None, 1, 1)):
        monkeypatch.setattr(spreading.os, "cpu_count", lambda cpus=cpus: cpus)
        assert (threads_for(2**34), background_threads(2**34)) == (waited_for, background)
        assert (threads_for(2**20), background_threads(0)) == (1, 1)
