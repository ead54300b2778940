"""A job that its caller may cancel, as long as that leaves all as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from apollo_grpc.errors import Cancelled
from apollo_trainer.checkpoints.directory import Progress

T = TypeVar("T")


class Job(Future[T]):
    """The future of what a call began.

    `cancel` ends a waiting job at once. A job at work ends by an error at its next progress, and
    whoever does the work cleans up as after any error.

    Args:
        tell: called with its progress.
    """

    def __init__(self, tell: Progress):
        super().__init__()
        self._tell, self._deciding = tell, threading.Lock()
        self._asked = self._closed = self._begun = False
        self._tell_begun: Callable[[], None] = lambda: None

    def when_begun(self, call: Callable[[], None]) -> None:
        """Has `call` called once it is at work, at once where it is or was. It must not raise."""
        with self._deciding:
            if not self._begun:
                self._tell_begun = call
                return
        call()

    def set_running_or_notify_cancel(self) -> bool:
        """Begins, unless it was cancelled: returns which."""
        begins = super().set_running_or_notify_cancel()
        if begins:
            with self._deciding:
                self._begun = True
            self._tell_begun()
        return begins

    def cancel(self) -> bool:
        """Asks it to stop; returns False where it has ended otherwise, or was closed."""
        if super().cancel():
            return True
        if self.done():
            return isinstance(self.exception(), Cancelled)
        with self._deciding:
            self._asked = not self._closed
            return self._asked

    def progress(self, done: int, total: int, current: str) -> None:
        """Tells its progress. Raises Cancelled where it is to stop, but not at the end."""
        if current:
            self._require_wanted()
        self._tell(done, total, current)

    def close(self) -> None:
        """Forbids to stop it from now on. Raises Cancelled where it is to stop already."""
        with self._deciding:
            self._closed = not self._asked
        self._require_wanted()

    def _require_wanted(self) -> None:
        with self._deciding:
            if self._asked:
                raise stopped()


def stopped() -> Cancelled:
    """The error of a job that was stopped."""
    return Cancelled(
        "The job was stopped as asked; all is as it was before. The same call begins it anew.",
        reason="JOB_CANCELLED",
    )
