"""Watches the sidecar: finds an engine when it appears, and knows at once when it is gone."""

from __future__ import annotations

import logging
import threading

from apollo_grpc.errors import ApolloError
from apollo_trainer.runs.owner import ModelOwner
from apollo_trainer.weights.sidecar import Sidecar

log = logging.getLogger(__name__)
RETRY_SECONDS = 0.5


def no_engine(address: str) -> str:
    """What a user reads while there is no sidecar."""
    return (
        f"No sidecar answers at {address}: start vLLM with VLLM_PLUGINS=apollo and apollo-grpc "
        "installed beside it, or run 'apollo up MODEL'."
    )


class EngineWatch:
    """A thread that follows WatchGeneration and tells the owner what it sees."""

    def __init__(self, sidecar: Sidecar, owner: ModelOwner):
        self._sidecar, self._owner = sidecar, owner
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        attached = False
        while not self._stopped.is_set():
            try:
                for generation in self._sidecar.generations():
                    self._owner.engine_found(generation.epoch)
                    attached = True
            except ApolloError as error:
                log.debug("the watch ended: %s", error.message)
            # A stopped server closes the channel, which is no word about the engine.
            if attached and not self._stopped.is_set():
                log.warning("vLLM is gone")
                self._owner.engine_lost(f"vLLM is gone. {no_engine(self._sidecar.address)}")
                attached = False
            self._stopped.wait(RETRY_SECONDS)

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()
        self._sidecar.close()
        self._thread.join()
