"""The training thread: it does jobs in order, one at a time."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from apollo_grpc.errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")


class TrainingThread:
    """Does jobs until `end`.

    Attributes:
        stopping: set once the server is to stop.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="training", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job of the training thread failed")

    def do(self, job: Callable[[], None]) -> None:
        """Queues a job behind those that wait. Any thread, event loops too.

        It is within the caller's span, and its lines of the log are about what the caller's are.
        """
        self._jobs.put(partial(copy_context().run, job))

    def between_runs(self, work: Callable[[], T], future: Future[T] | None = None) -> Future[T]:
        """Queues work and returns its future; the work begins once the run at work has ended.

        Args:
            future: the one to use; if it is cancelled by then, the work never begins.

        Raises Unavailable when the server stops; so does the future of work that had not begun.
        Any thread, event loops too.
        """
        future = Future() if future is None else future
        with self._lock:
            # After the thread's last job nobody would ever resolve it.
            if self.stopping.is_set():
                raise _stopping()
            self.do(lambda: self._resolve(future, work))
        return future

    def _resolve(self, future: Future[T], work: Callable[[], T]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self.stopping.is_set():
                raise _stopping()
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    def end(self, last: Callable[[], None]) -> None:
        """Sets `stopping`, has the last job done behind those that wait, and joins the thread."""
        with self._lock:
            self.stopping.set()
            self._jobs.put(last)
            self._jobs.put(None)
        self._thread.join()


def _stopping() -> Unavailable:
    return Unavailable(
        "The server is stopping; nothing was done. Ask again when it is started.",
        reason="SERVER_STOPPING",
    )
