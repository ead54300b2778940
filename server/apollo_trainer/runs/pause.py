"""vLLM's pause around a run: a lease, renewed while the run goes on."""

from __future__ import annotations

import threading
import time
import uuid

from apollo_grpc.errors import ApolloError
from apollo_trainer.weights.attach import Attachment
from apollo_trainer.weights.sidecar import Sidecar

RENEWALS_PER_LEASE = 3


class EnginePause:
    """Holds vLLM until `end`; if this process dies, the lease runs out and vLLM goes on.

    Raises the sidecar's error when the pause cannot begin.
    """

    def __init__(self, sidecar: Sidecar, attachment: Attachment, lease_seconds: float):
        self._sidecar, self._epoch = sidecar, attachment.epoch
        self._lease_id, self._seconds = uuid.uuid4().hex, lease_seconds
        self._ended = threading.Event()
        self.lost: ApolloError | None = None
        self._began = time.monotonic()
        self._renew()
        self._renewer = threading.Thread(target=self._keep_renewing, daemon=True)
        self._renewer.start()

    def _renew(self) -> None:
        self._sidecar.pause(self._epoch, self._lease_id, self._seconds)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._seconds / RENEWALS_PER_LEASE):
            try:
                self._renew()
            except ApolloError as error:
                self.lost = error
                return

    def end(self, *, weights_changed: bool) -> int:
        """Lets vLLM go on, its caches dropped first when the weights changed.

        Returns the weight version. Raises the sidecar's error: vLLM then goes on when its lease
        runs out, or has gone on with caches of older weights.
        """
        self._ended.set()
        self._renewer.join()
        return self._sidecar.resume(self._epoch, self._lease_id, weights_changed=weights_changed)

    @property
    def held_seconds(self) -> float:
        """Since the pause began."""
        return time.monotonic() - self._began
