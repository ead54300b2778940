"""Whether somebody else than the sidecar wants vLLM paused.

vLLM knows one pause, whoever asked for it: `is_paused` does not say whose it is, and a resume ends
all of them. So those that come through this API server are listened to; of those that came
through another one, what `is_paused` says before a lease begins is all that is known.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

Call = Callable[..., Awaitable[Any]]
WHO = "somebody else (POST /pause or /sleep)"


class OthersPause:
    """Listens to one client's pauses and resumes. Used on the client's event loop.

    Args:
        client: vLLM's AsyncLLM, whose methods are replaced by ones that are listened to.
        held: whether a lease pauses vLLM, or is about to.

    Attributes:
        wanted: whether vLLM is to stay paused when no training server holds it.
        resumes: how often somebody else made it go on, or let its requests in flight finish.
        pause: `client.pause_generation`, unheard.
        resume: `client.resume_generation`, unheard.
    """

    def __init__(self, client: Any, held: Callable[[], bool]):
        self._client, self._held = client, held
        self.wanted, self.resumes = False, 0
        self.pause, self.resume = client.pause_generation, client.resume_generation
        for name in ("pause_generation", "sleep"):
            self._listen(name, self._paused)
        for name in ("resume_generation", "wake_up"):
            self._listen(name, self._resumed)

    def _listen(self, name: str, hear: Callable[..., Awaitable[Any]]) -> None:
        call = getattr(self._client, name, None)
        if call is None:
            return

        @functools.wraps(call)
        async def heard(*args: Any, **kwargs: Any) -> Any:
            return await hear(call, *args, **kwargs)

        setattr(self._client, name, heard)

    async def _paused(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        # Before it is done: a lease that ends meanwhile would end it.
        before, self.wanted = self.wanted, True
        if "wait" in (*args, *kwargs.values()) or kwargs.get("wait_for_inflight_requests"):
            # It lets requests go on that a training server's pause had stopped.
            self.resumes += 1
        try:
            return await call(*args, **kwargs)
        except BaseException:
            self.wanted = before
            raise

    async def _resumed(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        try:
            return await call(*args, **kwargs)
        finally:
            # One that woke up in part still sleeps.
            if not await self._client.is_paused():
                self.wanted, self.resumes = False, self.resumes + 1

    async def look(self) -> bool:
        """Whether vLLM is paused; without a lease that is what somebody else wants."""
        paused = bool(await self._client.is_paused())
        # Afterwards: it may be a lease's that began meanwhile.
        if not self._held():
            self.wanted = paused
        return paused
