"""Watches the sidecar, and tells the owner when an engine appears and when it is gone or wedged."""

from __future__ import annotations

import logging
import math
import threading
import time

from apollo_grpc import process_state
from apollo_grpc.errors import ApolloError, printable
from apollo_trainer.engine.owner import ModelOwner
from apollo_trainer.weights.sidecar import Sidecar

log = logging.getLogger(__name__)
RETRY_SECONDS = 0.25
# The sidecar beats four times a second; a silent engine is to be lost within two seconds.
SILENCE_SECONDS = 1.1
# Unless nothing at all is heard of a sidecar whose process runs: a busy CPU makes it late.
BUSY_SECONDS = 10.0
# This process may itself have been stopped, and have beats to read first.
GRACE_SECONDS = 0.25


def no_engine(address: str) -> str:
    """Returns what a user reads while there is no sidecar."""
    return (
        f"No sidecar answers at {printable(address)}: start vLLM with VLLM_PLUGINS=apollo and "
        "apollo-grpc installed beside it, or run 'apollo up MODEL'."
    )


class EngineWatch:
    """Runs two threads: one reads the sidecar's beats, one notices when they stay away."""

    def __init__(self, sidecar: Sidecar, owner: ModelOwner):
        self._sidecar, self._owner = sidecar, owner
        self._stopped, self._beat = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._heard = False
        # When the sidecar said something last, be it that vLLM gives no answer; and its process.
        self._spoke, self._process = -math.inf, (0, 0)
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._read, "engine-watch"), (self._guard, "engine-silence"))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        while not self._stopped.is_set():
            try:
                for generation in self._sidecar.generations():
                    self._spoke = time.monotonic()
                    self._process = generation.pid, generation.pid_namespace
                    if generation.no_answer:
                        continue
                    with self._lock:
                        self._heard = True
                    self._beat.set()
                    iterations = zip(
                        generation.iteration_ends, generation.iteration_seconds, strict=False
                    )
                    self._owner.engine_told(generation.epoch, generation.weight_version, iterations)
                    self._owner.engine_found(
                        generation.epoch, generation.generation, generation.paused_by_others
                    )
            except ApolloError as error:
                log.debug("the watch ended: %s", error.message)
                if error.reason == "ENGINE_HELD":
                    self._owner.engine_held(error.message)
            if self._lose("vLLM is gone."):
                # What still answers is an API server on its way out, for seconds.
                self._sidecar.abandon()
            self._stopped.wait(RETRY_SECONDS)

    def _guard(self) -> None:
        while not self._stopped.is_set():
            silent = not (self._beat.wait(SILENCE_SECONDS) or self._beat.wait(GRACE_SECONDS))
            self._beat.clear()
            if not silent or self._may_be_late():
                continue
            if self._lose("vLLM does not answer: it is stopped or wedged."):
                self._sidecar.abandon()

    def _may_be_late(self) -> bool:
        """Whether the sidecar may have too much to do, or this process, to tell that vLLM is there.

        One that says that vLLM gives no answer is not late.
        """
        (pid, namespace), silent = self._process, time.monotonic() - self._spoke
        seen = bool(pid) and namespace == process_state.namespace()
        return SILENCE_SECONDS < silent < BUSY_SECONDS and seen and process_state.runs(pid)

    def _lose(self, what: str) -> bool:
        """Tells the owner once for each engine that was heard; returns whether it did."""
        with self._lock:
            was_heard, self._heard = self._heard, False
        # A stopped server closes the channel, which is no word about the engine.
        if not was_heard or self._stopped.is_set():
            return False
        log.warning("%s", what)
        self._owner.engine_lost(f"{what} {no_engine(self._sidecar.address)}")
        return True

    def stop(self) -> None:
        """Ends both threads."""
        self._stopped.set()
        self._beat.set()
        self._sidecar.close()
        for thread in self._threads:
            thread.join()
