"""The lease under which weights are written; vLLM is paused while it lasts, unless it is LIVE's."""

from __future__ import annotations

import threading
import time
import uuid

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_trainer.weights.attachment import Attachment
from apollo_trainer.weights.liveness import LONGEST_LEASE_SECONDS
from apollo_trainer.weights.sidecar import Sidecar

RENEWALS_PER_LEASE = 3
# Somebody may let vLLM go on meanwhile; to ask costs a step about a millisecond.
CONFIRMED_SECONDS = 0.25
HELD_POLL_SECONDS = 0.1


class EnginePause:
    """Holds a lease until `end`, and renews it on a thread of its own.

    If this process dies, the lease runs out: vLLM counts an update, drops its caches and goes on.

    Args:
        stops: whether vLLM waits; else it is only told that weights may be written.

    Raises the sidecar's error when the lease is refused.
    """

    def __init__(
        self, sidecar: Sidecar, attachment: Attachment, lease_seconds: float, *, stops: bool = True
    ):
        self._sidecar, self._attachment, self._stops = sidecar, attachment, stops
        self._lease_id, self._seconds = uuid.uuid4().hex, lease_seconds
        self._ended = threading.Event()
        self._error: ApolloError | None = None
        self._held_until = self._confirmed = 0.0
        self._acquire()
        self._began = self._confirmed
        self._renewer = threading.Thread(target=self._keep_renewing, daemon=True)
        self._renewer.start()

    def _acquire(self) -> None:
        """A lease that is held is a dead server's, or one whose end was not told: it runs out."""
        deadline = time.monotonic() + LONGEST_LEASE_SECONDS
        while True:
            try:
                self._renew()
                return
            except FailedPrecondition as error:
                late = time.monotonic() > deadline or self._attachment.gone
                if error.reason != "LEASE_HELD" or late:
                    raise
            time.sleep(HELD_POLL_SECONDS)

    def _renew(self) -> None:
        # From before the call on: the sidecar counts from when it arrives, which is later.
        asked = time.monotonic()
        epoch, lease_id = self._attachment.epoch, self._lease_id
        self._sidecar.pause(epoch, lease_id, self._seconds, stops=self._stops)
        self._held_until, self._confirmed = asked + self._seconds, asked

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._seconds / RENEWALS_PER_LEASE) and not self._error:
            self._try_to_renew()

    def _try_to_renew(self) -> None:
        try:
            self._renew()
        except ApolloError as error:
            self._error = error

    def confirm(self) -> None:
        """Renews the lease right before a write, unless that was done just now; see `lost`."""
        if not self._stops or self._error:
            return
        if time.monotonic() - self._confirmed >= CONFIRMED_SECONDS:
            self._try_to_renew()

    @property
    def lost(self) -> ApolloError | None:
        """Why vLLM may have gone on already; None while it surely waits."""
        if self._error is None and time.monotonic() >= self._held_until:
            return FailedPrecondition("it ran out unrenewed", reason="LEASE_ENDED")
        return self._error

    def end(self, *, weights_changed: bool, updates: int = 0, keep_caches: bool = False) -> int:
        """Ends the lease: vLLM drops its caches where the weights changed, and goes on.

        Args:
            updates: whole updates that were written.
            keep_caches: whether the caches are not dropped.

        Returns the weight version. Raises the sidecar's error: vLLM then goes on when its lease
        runs out, or has gone on with caches of older weights.
        """
        self._ended.set()
        self._renewer.join()
        if self._attachment.gone:
            # A wedged engine would hold the training thread until the call's deadline.
            raise Unavailable("vLLM is gone, or does not answer.")
        self._attachment.synchronize()
        return self._sidecar.resume(
            self._attachment.epoch,
            self._lease_id,
            weights_changed=weights_changed,
            updates=updates,
            keep_caches=keep_caches,
        )

    @property
    def held_seconds(self) -> float:
        """Seconds since the lease began."""
        return time.monotonic() - self._began
