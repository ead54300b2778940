"""vLLM's pause around a run: a lease, renewed while the run goes on. LIVE's does not pause."""

from __future__ import annotations

import threading
import time
import uuid

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_trainer.weights.attach import Attachment
from apollo_trainer.weights.sidecar import Sidecar

RENEWALS_PER_LEASE = 3
# Somebody may let vLLM go on meanwhile; to ask costs a step about a millisecond.
CONFIRMED_SECONDS = 0.25


class EnginePause:
    """Holds vLLM until `end`; if this process dies, the lease runs out and vLLM goes on.

    It then counts an update and drops its caches, since nobody tells what was written.

    Args:
        stops: whether vLLM waits; without, it is only told that weights may be written.

    Raises the sidecar's error when the pause cannot begin.
    """

    def __init__(
        self, sidecar: Sidecar, attachment: Attachment, lease_seconds: float, *, stops: bool = True
    ):
        self._sidecar, self._attachment, self._stops = sidecar, attachment, stops
        self._lease_id, self._seconds = uuid.uuid4().hex, lease_seconds
        self._ended = threading.Event()
        self._error: ApolloError | None = None
        self._began = time.monotonic()
        self._held_until = self._confirmed = 0.0
        self._renew()
        self._renewer = threading.Thread(target=self._keep_renewing, daemon=True)
        self._renewer.start()

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
        """Right before a write: asks whether vLLM still waits, if that is not known of just now.

        What was found is told by `lost`.
        """
        if not self._stops or self._error:
            return
        if time.monotonic() - self._confirmed >= CONFIRMED_SECONDS:
            self._try_to_renew()

    @property
    def lost(self) -> ApolloError | None:
        """Why vLLM may have gone on already; None while it certainly has not."""
        if self._error is None and time.monotonic() >= self._held_until:
            return FailedPrecondition("it ran out unrenewed", reason="LEASE_ENDED")
        return self._error

    def end(self, *, weights_changed: bool, updates: int = 0, keep_caches: bool = False) -> int:
        """Lets vLLM go on, its caches dropped first when the weights changed.

        Args:
            updates: how many were written; those that failed halfway not counted.
            keep_caches: do not drop them.

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
        """Since the pause began."""
        return time.monotonic() - self._began
