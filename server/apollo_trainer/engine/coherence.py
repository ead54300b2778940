"""How a run's writes and vLLM's reads go together: which pauses are held, and when caches go.

LIVE writes while vLLM decodes: a forward pass may read weights of two versions. PAUSE_STEP holds
vLLM around each write, PAUSE_RUN around the whole run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine.pause import EnginePause
from apollo_trainer.weights.attach import Attachment
from apollo_trainer.weights.sidecar import Sidecar

# Reasons of a call that nobody answers any more.
_GONE = ("ENGINE_LOST", "ENGINE_STOPPING", Unavailable.default_reason)


def engine_is_gone(error: ApolloError) -> bool:
    """Whether a failed call says that there is no engine any more; a slow one still is there."""
    return isinstance(error, Unavailable) and error.reason in _GONE


@dataclass
class Written:
    """What a run has done to the weights.

    Attributes:
        updates: whole updates that vLLM has not been told of.
        dirty: whether vLLM's caches may be of older weights, by an unfinished update too.
    """

    updates: int = 0
    dirty: bool = False


class Coherence(ABC):
    """The part that all modes share; one object a run.

    `begin`, then for each step `before_write` (any number of times) and `after_step`, at last
    `end`. All raise the sidecar's error, and `before_write` whatever forbids the write.

    Attributes:
        held_seconds: how long vLLM was paused for the run so far.
        step_held_seconds: how long for the last step alone.
        weight_version: the last one that the sidecar told of; None before.
        untold: whether the sidecar will count an update that it could not be told of.
    """

    def __init__(self, sidecar: Sidecar, attachment: Attachment, seconds: float, policy: Any):
        self._sidecar, self._attachment, self._seconds = sidecar, attachment, seconds
        self._policy = policy or pb.CACHE_POLICY_RESET_AT_END
        self._written, self._wrote = Written(), False
        self.held_seconds = self.step_held_seconds = 0.0
        self.weight_version: int | None = None
        self.untold = False

    def begin(self) -> None:  # noqa: B027
        """Before the first step."""

    def before_write(self) -> None:
        """Right before weights are written.

        Raises Unavailable where the engine is gone, FailedPrecondition where it went on early, or
        with WEIGHTS_CHANGED where somebody else changed its weights.
        """
        self._attachment.require_live()
        if self._attachment.gone:
            raise Unavailable("vLLM is gone.", reason="ENGINE_LOST")
        self._hold()
        if not self._wrote:
            self._attachment.require_as_left()
        self._wrote = self._written.dirty = True

    @abstractmethod
    def _hold(self) -> None:
        """Makes sure that vLLM is where the mode wants it for a write."""

    @abstractmethod
    def after_step(self) -> None:
        """The step's update is whole; vLLM is told of it."""

    def end(self) -> None:
        """After the last step, whole or not: vLLM goes on, with caches as the policy says."""
        try:
            if self._wrote:
                self._attachment.remember()
        finally:
            self._end()

    @abstractmethod
    def _end(self) -> None:
        """What `end` does in this mode."""

    @property
    def _resets_each_step(self) -> bool:
        return bool(self._policy == pb.CACHE_POLICY_RESET_EACH_STEP)

    @property
    def _resets_at_end(self) -> bool:
        return bool(self._policy != pb.CACHE_POLICY_KEEP)

    def _reset_caches(self) -> None:
        if self._written.dirty:
            self._sidecar.reset_caches(self._attachment.epoch)
            self._written.dirty = False


class _Leasing(Coherence):
    """What writes under a lease.

    Attributes:
        stops: whether vLLM waits while the lease lasts.
    """

    stops = True
    _pause: EnginePause | None = None

    def _acquire(self) -> None:
        self._pause = EnginePause(self._sidecar, self._attachment, self._seconds, stops=self.stops)

    def _hold(self) -> None:
        if self._pause:
            self._pause.confirm()
        lost = self._pause.lost if self._pause else None
        if lost and engine_is_gone(lost):
            raise lost
        if lost:
            raise FailedPrecondition(
                f"The lease to write ended before the run was done ({lost.message})",
                reason="PAUSE_LOST",
            )

    def _release(self, *, reset_caches: bool) -> None:
        pause, self._pause = self._pause, None
        if pause is None:
            return
        written = self._written
        self.untold = changed = written.dirty = bool(written.dirty or written.updates)
        try:
            self.weight_version = pause.end(
                weights_changed=changed, updates=written.updates, keep_caches=not reset_caches
            )
            self.untold = False
            # Caches that vLLM did not drop are still to be dropped at the end.
            written.dirty = changed and not reset_caches
        finally:
            self._count(pause)
            written.updates = 0

    def _count(self, pause: EnginePause) -> None:
        self.step_held_seconds = pause.held_seconds
        self.held_seconds += self.step_held_seconds


class Live(_Leasing):
    """Writes while vLLM decodes; the sidecar knows, and counts an update if the writer dies."""

    stops = False

    def _hold(self) -> None:
        if self._pause is None:
            self._acquire()
        super()._hold()
        self.untold = True

    def after_step(self) -> None:
        """One update more."""
        self._attachment.synchronize()
        self.weight_version = self._sidecar.raise_version(self._attachment.epoch, 1)
        self.untold = False
        if self._resets_each_step:
            self._reset_caches()

    def _end(self) -> None:
        """Resets what the policy says, and tells of a step that failed halfway."""
        pause, self._pause = self._pause, None
        if pause is None:
            return
        try:
            self._attachment.synchronize()
            if self._resets_at_end:
                self._reset_caches()
        finally:
            self.weight_version = pause.end(weights_changed=self.untold, keep_caches=True)
            self.untold = False


class PauseRun(_Leasing):
    """vLLM waits while the run is at work; no step is held for alone."""

    def _count(self, pause: EnginePause) -> None:
        self.held_seconds += pause.held_seconds

    def begin(self) -> None:
        """Pauses vLLM."""
        self._acquire()

    def after_step(self) -> None:
        """vLLM is told at the end: it reads nothing before."""
        self._written.updates += 1

    def _end(self) -> None:
        """Lets vLLM go on."""
        self._release(reset_caches=self._resets_at_end)


class PauseStep(_Leasing):
    """vLLM decodes during forward and backward, and waits while weights are written."""

    def _hold(self) -> None:
        if self._pause is None:
            self._acquire()
        super()._hold()

    def after_step(self) -> None:
        """Lets vLLM go on with the update."""
        self._written.updates += 1
        self._release(reset_caches=self._resets_each_step)

    def _end(self) -> None:
        """Ends the pause of a step that failed, and resets what the policy says."""
        self._release(reset_caches=self._resets_at_end)
        if self._resets_at_end:
            self._reset_caches()


_MODES: dict[int, type[Coherence]] = {
    pb.COHERENCE_MODE_UNSPECIFIED: PauseRun,
    pb.COHERENCE_MODE_PAUSE_RUN: PauseRun,
    pb.COHERENCE_MODE_PAUSE_STEP: PauseStep,
    pb.COHERENCE_MODE_LIVE: Live,
}


def coherence_of(
    asked: pb.Coherence, sidecar: Sidecar, attachment: Attachment, lease_seconds: float
) -> Coherence:
    """The mode that a spec asks for, and its cache policy; unset is PAUSE_RUN, RESET_AT_END."""
    return _MODES[asked.mode](sidecar, attachment, lease_seconds, asked.cache_policy)
