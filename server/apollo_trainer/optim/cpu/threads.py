"""Work in stages, spread over threads that each compute alone."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from threading import Barrier, Condition, Lock
from typing import Any, Generic, TypeVar

import torch

Task = Callable[[], Any]
Outcome = TypeVar("Outcome")
# Yields tasks that may run at the same time, and is resumed with what they returned.
Stages = Generator[Sequence[Task], list[Any], Outcome]
# Ends with whether the gradient was finite, and, where measured, with the change of each piece.
Stepping = Stages[tuple[bool, list[tuple[float, int]]]]


def run(works: Sequence[Stages[Outcome]]) -> list[Outcome]:
    """Runs all works to their ends, on torch.get_num_threads() threads; returns their results.

    Within a task torch uses one thread, so that no product depends on how many there are. If one
    raises, the others stop after their current task, and this raises the error once all have.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [_run_alone(work) for work in works]
    line = _Line(works)
    if len(works) == 1:
        # What yields nothing is not worth waking a thread.
        line.resume(0, None)
    if line.unfinished:
        pool = _pool(threads, os.getpid())
        running = [pool.submit(line.serve) for _ in range(threads)]
        wait(running)
        for each in running:
            each.result()
    return [line.outcomes[n] for n in range(len(works))]


def _run_alone(work: Stages[Outcome]) -> Outcome:
    results: list[Any] | None = None
    while True:
        try:
            # None starts a generator.
            tasks = work.send(results)  # type: ignore[arg-type]
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        results = [task() for task in tasks]


class _Line(Generic[Outcome]):
    """A queue of tasks: those of works that have begun come before works that have not."""

    def __init__(self, works: Sequence[Stages[Outcome]]) -> None:
        self._works = works
        self.outcomes: dict[int, Outcome] = {}
        self.unfinished, self._failed = len(works), False
        self._changed = Condition()
        starts: list[Task] = [partial(self.resume, n, None) for n in range(len(works))]
        self._ready = deque(starts if len(works) > 1 else [])

    def serve(self) -> None:
        """Runs tasks until all works have ended, or one has failed."""
        try:
            while (task := self._next()) is not None:
                task()
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise

    def _next(self) -> Task | None:
        with self._changed:
            while self.unfinished and not self._failed and not self._ready:
                self._changed.wait()
            return None if self._failed or not self.unfinished else self._ready.popleft()

    def resume(self, n: int, results: list[Any] | None) -> None:
        """Lets a work go on to its next tasks, or to its end."""
        tasks: Sequence[Task] = ()
        while not tasks:
            try:
                tasks = self._works[n].send(results)  # type: ignore[arg-type]
            except StopIteration as end:
                with self._changed:
                    self.outcomes[n] = end.value
                    self.unfinished -= 1
                    self._changed.notify_all()
                return
            results = []
        stage = _Stage(tasks, partial(self.resume, n))
        with self._changed:
            self._ready.extendleft(partial(stage.run, i) for i in reversed(range(len(tasks))))
            self._changed.notify(len(tasks))


class _Stage:
    """Tasks that may run at the same time; whichever ends last calls `then` with all results."""

    def __init__(self, tasks: Sequence[Task], then: Callable[[list[Any]], None]) -> None:
        self._tasks, self._then = tasks, then
        self._results: dict[int, Any] = {}
        self._lock = Lock()

    def run(self, i: int) -> None:
        """Runs one task."""
        result = self._tasks[i]()
        with self._lock:
            self._results[i] = result
            last = len(self._results) == len(self._tasks)
        if last:
            self._then([self._results[k] for k in range(len(self._tasks))])


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """The threads of one process; those of its parent did not survive a fork."""
    started = Barrier(threads + 1)

    def compute_alone() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "apollo", compute_alone)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    # torch keeps the number for each thread, and the last one that was set for threads to come.
    torch.set_num_threads(threads)
    return pool
