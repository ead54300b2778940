"""A pause is a lease: a training server that dies cannot freeze the engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from apollo_grpc.errors import ApolloError, FailedPrecondition

log = logging.getLogger("vllm.apollo")

MAX_LEASE_SECONDS = 60.0
T = TypeVar("T")
# A late renewal would otherwise pause an engine that nobody writes to.
KEPT_ENDED = 256
RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 5.0


class PauseLeases:
    """At most one lease at a time, kept alive by renewals.

    What fails when one ends is tried again until it works: nobody else would let the engine go on.

    Args:
        pause: stops the engine; called when a lease begins, with its mode.
        resume: lets it go on, after `tell`; called when a lease ends, with how many updates were
            written, at least 1 where the weights may have changed, and whether what is cached goes
            with them. With 0 it does what is left of calls that failed.
        tell: the same for an engine that goes on already, or is paused under another lease.
        require_kept: called when a lease is renewed; what it raises ends the lease.
    """

    def __init__(
        self,
        pause: Callable[[str], None],
        resume: Callable[[int, bool], None],
        tell: Callable[[int, bool], None],
        require_kept: Callable[[], None] = lambda: None,
    ):
        self._pause, self._resume, self._tell = pause, resume, tell
        self._require_kept = require_kept
        # Held while the engine is asked to pause or resume, so that the two never cross.
        self._lock = threading.Lock()
        self._lease_id = ""
        # By id: whether the holder has said what it wrote.
        self._ended: OrderedDict[str, bool] = OrderedDict()
        self._deadline = 0.0
        self._timer: threading.Timer | None = None
        self._retry: threading.Timer | None = None

    @property
    def active(self) -> bool:
        """Whether somebody has a lease."""
        return bool(self._lease_id)

    def acquire(self, lease_id: str, seconds: float, mode: str) -> float:
        """Begins or renews a lease and returns the seconds that are left of it.

        Raises FailedPrecondition when another lease is active, or when this one has ended: what
        its holder wrote since then was not protected.
        """
        with self._lock:
            if lease_id in self._ended:
                raise FailedPrecondition(
                    "The pause has ended; the engine went on. Begin a new one.",
                    reason="LEASE_ENDED",
                )
            if self._lease_id not in ("", lease_id):
                raise FailedPrecondition(
                    "The engine is written to under another lease. Wait until that ends.",
                    reason="LEASE_HELD",
                )
            if self._lease_id:
                self._renew()
            else:
                self._begin(mode)
                self._lease_id = lease_id
            self._arm(min(seconds, MAX_LEASE_SECONDS))
            return self._deadline - time.monotonic()

    def during(self, lease_id: str, work: Callable[[], T]) -> T:
        """Does what must not outlast the lease, which does not end meanwhile.

        Raises FailedPrecondition where it has ended.
        """
        with self._lock:
            if not lease_id or lease_id != self._lease_id:
                raise FailedPrecondition(
                    "The pause has ended; the engine went on. Begin a new one.",
                    reason="LEASE_ENDED",
                )
            return work()

    def release(self, lease_id: str, updates: int, reset_caches: bool = True) -> None:
        """Ends a lease. Ending one again does nothing, but that of one that ran out is told of.

        Raises FailedPrecondition for a lease that never was, or ended long ago.
        """
        with self._lock:
            if lease_id in self._ended:
                self._tell_late(lease_id, updates, reset_caches)
                return
            if not lease_id or lease_id != self._lease_id:
                raise FailedPrecondition("There is no such pause.", reason="LEASE_UNKNOWN")
            self._end(updates, reset_caches, told=True)

    def _tell_late(self, lease_id: str, updates: int, reset_caches: bool) -> None:
        """What a holder wrote after its lease ran out was cached by an engine that went on."""
        told, self._ended[lease_id] = self._ended[lease_id], True
        if told or not updates:
            return
        try:
            self._tell(updates, reset_caches)
        except BaseException:
            self._try_again(RETRY_SECONDS)
            raise

    def _renew(self) -> None:
        try:
            self._require_kept()
        except ApolloError as error:
            self._end_unasked(error.message)
            raise

    def _begin(self, mode: str) -> None:
        try:
            self._pause(mode)
        except BaseException:
            # It may have stopped the engine before it failed, and no lease would ever end that.
            self._let_go(0, False)
            raise

    def _let_go(self, updates: int, reset_caches: bool) -> None:
        try:
            self._resume(updates, reset_caches)
        except BaseException:
            self._try_again(RETRY_SECONDS)
            raise

    def finish_soon(self) -> None:
        """Does what is left of calls that failed, or has become due; again until it works."""
        with self._lock:
            self._try_again(RETRY_SECONDS)

    def _try_again(self, seconds: float) -> None:
        if self._retry:
            self._retry.cancel()
        self._retry = threading.Timer(seconds, self._again, [seconds])
        self._retry.daemon = True
        self._retry.start()

    def _again(self, waited: float) -> None:
        with self._lock:
            if self._lease_id:
                # The end of that one does what is left.
                return
            try:
                self._resume(0, False)
            except Exception as error:
                if isinstance(error, ApolloError) and error.reason == "ENGINE_STOPPING":
                    return
                log.warning("apollo: after a pause, tried again soon: %s", error)
                self._try_again(min(2 * waited, MAX_RETRY_SECONDS))

    def _arm(self, seconds: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._deadline = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._expire, [self._lease_id])
        # Otherwise a paused engine could not exit before the lease ran out.
        self._timer.daemon = True
        self._timer.start()

    def _expire(self, lease_id: str) -> None:
        with self._lock:
            if lease_id == self._lease_id and time.monotonic() >= self._deadline:
                self._end_unasked("It ran out unrenewed.")

    def _end_unasked(self, why: str) -> None:
        """Its holder has not said what it wrote, and may have died between two writes."""
        log.warning("apollo: the pause for training ends early. %s", why)
        try:
            # What is cached may be stale.
            self._end(1, True, told=False)
        except Exception as error:
            log.warning("apollo: after a pause that ended early: %s", error)

    def _end(self, updates: int, reset_caches: bool, *, told: bool) -> None:
        if self._timer:
            self._timer.cancel()
        try:
            self._let_go(updates, reset_caches)
        finally:
            # Otherwise a failed cache reset would leave a lease without a timer, which refuses
            # every later pause although the engine goes on.
            self._ended[self._lease_id], self._lease_id = told, ""
            if len(self._ended) > KEPT_ENDED:
                self._ended.popitem(last=False)
