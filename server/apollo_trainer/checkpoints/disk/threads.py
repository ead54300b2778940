"""Work on many tensors at once, over threads: a model may also be one huge tensor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_MOST_THREADS = 8
# Bytes that are worth a thread of their own.
_SHARE = 2**24
# Bytes that are worth a call of their own.
_BATCH = 2**23


def threads_for(size: int) -> int:
    """How many threads work on so many bytes, while somebody waits for it."""
    return max(1, min(_MOST_THREADS, os.cpu_count() or 1, size // _SHARE))


def background_threads(size: int) -> int:
    """How many threads work on so many bytes beside training, and do not slow it."""
    return min(threads_for(size), 1 if (os.cpu_count() or 1) < 8 else 2)


def spread(
    work: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> Sequence[_Result]:
    """Calls `work` with every item, on so many threads; returns the results in the items' order.

    When an item fails, no other begins. Raises its error, after all threads have ended.
    """
    if threads == 1:
        return [work(item) for item in items]
    failed = threading.Event()

    def unless_one_failed(item: _Item) -> _Result:
        if failed.is_set():
            raise CancelledError
        try:
            return work(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads, "checkpoint") as pool:
        futures = [pool.submit(unless_one_failed, item) for item in items]
    for error in (future.exception() for future in futures):
        if error is not None and not isinstance(error, CancelledError):
            raise error
    return [future.result() for future in futures]


def in_batches(items: Sequence[_Item], size: Callable[[_Item], int]) -> list[list[_Item]]:
    """The items in order, small ones together: handing one to a thread costs 50 us."""
    batches: list[list[_Item]] = []
    room = 0
    for item in items:
        if not batches or size(item) > room:
            batches.append([])
            room = _BATCH
        batches[-1].append(item)
        room -= size(item)
    return batches


def spread_by_size(
    work: Callable[[str, int], _Result], sizes: Mapping[str, int], threads: int
) -> dict[str, _Result]:
    """Calls `work` for every name; returns the results by name, in the order of `sizes`.

    Args:
        work: gets a name, and how many threads it may use itself. A tensor that is larger than one
            thread's share gets all threads, with no other at the same time; the rest get one each.
        sizes: bytes, by name.
    """
    share = sum(sizes.values()) // threads
    huge = [name for name, size in sizes.items() if threads > 1 and size > max(share, _SHARE)]
    results = {name: work(name, threads) for name in huge}
    rest = sorted(sizes.keys() - results.keys(), key=lambda name: -sizes[name])
    results |= zip(rest, spread(lambda name: work(name, 1), rest, threads), strict=True)
    return {name: results[name] for name in sizes}
