"""Where and how long a client may be used, told before the transport fails in its own words."""

from __future__ import annotations

import asyncio
import os

from apollo_grpc.errors import FailedPrecondition


class Lifetime:
    """Of one client: in the process, and with asyncio on the loop, that made it, until it closes.

    Attributes:
        closed: its streams end and its calls are refused.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None):
        self._process, self._loop = os.getpid(), loop
        self.closed = False

    def require_open(self) -> None:
        """Raises FailedPrecondition where no call can be made: here, or any more."""
        self.require_here()
        if self.closed:
            raise FailedPrecondition(
                "The client is closed: make another one.", reason="CLIENT_CLOSED"
            )

    def require_here(self) -> None:
        """Raises FailedPrecondition in another process or on another loop than the client's."""
        if not self.is_own_process():
            raise FailedPrecondition(
                "The client was made before this process was forked: make another one here.",
                reason="CLIENT_FORKED",
            )
        if self._loop and running_loop() is not self._loop:
            raise FailedPrecondition(
                "The client belongs to another event loop: make one on each loop.",
                reason="WRONG_EVENT_LOOP",
            )

    def is_own_process(self) -> bool:
        """Whether this is the process that made the client."""
        return os.getpid() == self._process


def running_loop() -> asyncio.AbstractEventLoop:
    """The loop that runs now. Raises FailedPrecondition outside of one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise FailedPrecondition(
            "AsyncApolloClient works on a running event loop: make and use it in a coroutine, as "
            "asyncio.run() runs one.",
            reason="NO_EVENT_LOOP",
        ) from None


def is_cancelled() -> bool:
    """Whether somebody cancelled the task that runs now."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
