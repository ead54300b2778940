"""Blocking calls on vLLM's own asyncio client, for gRPC's threads."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from apollo_grpc.errors import FailedPrecondition, Unavailable

CALL_SECONDS = 120.0
# A paused engine has nothing else to do than to answer.
PING_SECONDS = 1.0
# Calls what it is given when the caller has its answer or is gone; False where it already is.
OnEnd = Callable[[Callable[[], object]], bool]
T = TypeVar("T")


class VllmCalls:
    """Runs calls on vLLM's event loop, which is never blocked, and waits for their results.

    Args:
        client: vLLM's AsyncLLM (vllm/v1/engine/async_llm.py); the methods used here are the same
            in 0.26, 0.32 and 0.33.
        loop: the event loop that `client` lives on.
    """

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop):
        self.client, self._loop = client, loop
        self._lock, self._at_work = threading.Lock(), 0

    @property
    def alive(self) -> bool:
        """Whether neither the engine nor vLLM's event loop has ended."""
        return self._loop.is_running() and not self.client.errored

    @property
    def version(self) -> str:
        """vLLM's, which is loaded where the sidecar is; empty where it does not tell."""
        return str(getattr(sys.modules.get("vllm"), "__version__", ""))

    @property
    def at_work(self) -> bool:
        """Whether a call of the sidecar's is: vLLM's engine core answers one after the other."""
        return self._at_work > 0

    def wait_for(
        self,
        coroutine: Coroutine[Any, Any, T],
        seconds: float = CALL_SECONDS,
        on_end: OnEnd | None = None,
    ) -> T:
        """The result of a call; raises Unavailable where vLLM stops, ends or is too slow.

        Args:
            on_end: of the caller, for whom the call is given up; `add_callback` of gRPC's context.
        """
        self._count(1)
        try:
            return self._wait_for(coroutine, seconds, on_end)
        finally:
            self._count(-1)

    def ping(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """As `wait_for`, within a second: of a question that is answered at once or not at all."""
        return self._wait_for(coroutine, PING_SECONDS, None)

    def _count(self, calls: int) -> None:
        with self._lock:
            self._at_work += calls

    def _wait_for(
        self, coroutine: Coroutine[Any, Any, T], seconds: float, on_end: OnEnd | None
    ) -> T:
        if not self._loop.is_running():
            coroutine.close()
            raise Unavailable("vLLM is stopping.", reason="ENGINE_STOPPING")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        if on_end and not on_end(future.cancel):
            future.cancel()
        try:
            return future.result(seconds)
        except CancelledError:
            raise Unavailable(
                "vLLM is stopping, or the caller is gone.", reason="ENGINE_STOPPING"
            ) from None
        except TimeoutError:
            # A pause that takes effect after it was given up would have no lease to end it.
            future.cancel()
            raise Unavailable(
                f"vLLM did not answer within {seconds:g} s.", reason="ENGINE_SLOW"
            ) from None
        except Exception as error:
            # By name: the module is vLLM's, which the tests of this class do without.
            if type(error).__name__ != "EngineDeadError":
                raise
            raise Unavailable(
                "vLLM's engine ended while it was asked; vLLM's log says why.",
                reason="ENGINE_STOPPING",
            ) from error

    def ask_workers(self, method: str, *args: bytes) -> list[bytes]:
        """The answers of all workers, by their rank.

        Raises FailedPrecondition where one refuses, else as `wait_for`.
        """
        answers = self.wait_for(self.client.collective_rpc(method, args=args))
        for reason, message, _ in answers:
            if reason:
                raise FailedPrecondition(message, reason=reason)
        return [bytes(payload) for _, _, payload in answers]
