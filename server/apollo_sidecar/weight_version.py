"""How many updates were written to the weights, and what vLLM is told of them."""

from __future__ import annotations

import threading
import time

from apollo_grpc.errors import Unavailable
from apollo_sidecar.vllm_calls import VllmCalls

RESET_ATTEMPTS = 20
RESET_WAIT_SECONDS = 0.05


class WeightVersion:
    """Counts updates, stamps vLLM's answers with their number, and drops what vLLM cached.

    A stamp or a drop that failed is made with the next `tell`.

    Args:
        number: updates that were counted before.

    Attributes:
        number: updates since this engine started. Those of a training server that died in a pause
            count as one.
        as_loaded: whether nobody can have written to the weights yet.
    """

    def __init__(self, vllm: VllmCalls, number: int, *, as_loaded: bool):
        self.number, self.as_loaded = number, as_loaded
        self._vllm = vllm
        self._changed = threading.Condition()
        self._unstamped = self._stale_caches = self._kept_caches = False

    def tell(self, updates: int, reset_caches: bool) -> None:
        """Counts updates; then stamps and drops what is due, one also where the other fails."""
        if updates:
            self._stale_caches |= reset_caches
            self._count(updates)
        try:
            self._stamp()
        finally:
            if self._stale_caches:
                self.reset_caches()

    def raise_by(self, updates: int) -> None:
        """Counts updates of the weights, stamps outputs with it where vLLM can, tells watchers."""
        self._count(updates)
        self._stamp()

    def is_cache_stale(self) -> bool:
        """Whether vLLM kept what older weights computed; the next `tell` drops it then.

        For when the training server that wanted it kept is gone.
        """
        self._stale_caches |= self._kept_caches
        return self._stale_caches

    def reset_caches(self) -> None:
        """Drops cached prefixes, of waiting requests too, which are then computed anew.

        Raises Unavailable when vLLM keeps refusing because blocks are held; the end of the next
        lease tries again.
        """
        self._stale_caches = True
        for _ in range(RESET_ATTEMPTS):
            reset = self._vllm.client.reset_prefix_cache(reset_running_requests=True)
            if self._vllm.wait_for(reset):
                self._stale_caches = self._kept_caches = False
                return
            time.sleep(RESET_WAIT_SECONDS)
        raise Unavailable(
            "vLLM did not drop its prefix cache: answers may still use prefixes of older weights. "
            "Call ResetCaches again when fewer requests are running.",
            reason="CACHE_NOT_RESET",
        )

    def wait_for_another(self, told: int, seconds: float) -> None:
        """Waits until the number is another than `told`, or for so long."""
        with self._changed:
            if told == self.number:
                self._changed.wait(seconds)

    def _count(self, updates: int) -> None:
        self.as_loaded, self._kept_caches = False, True
        with self._changed:
            self.number += updates
            self._changed.notify_all()
        self._unstamped = hasattr(self._vllm.client, "update_weight_version")

    def _stamp(self) -> None:
        if self._unstamped:
            self._vllm.wait_for(self._vllm.client.update_weight_version(str(self.number)))
            self._unstamped = False
