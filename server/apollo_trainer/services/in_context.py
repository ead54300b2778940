"""Threads that go on where their callers are: in the same span, and in the log about the same."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ThreadsInContext(ThreadPoolExecutor):
    """As `asyncio.to_thread` does it, with a bound of its own."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Has a thread do it."""
        context = copy_context()
        return super().submit(lambda: context.run(fn, *args, **kwargs))
