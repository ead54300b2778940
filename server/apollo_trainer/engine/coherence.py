"""The coherence modes: when vLLM is paused for a run's writes, and when its caches are dropped.

LIVE writes while vLLM decodes: a forward pass may read weights of two versions. PAUSE_STEP holds
vLLM around each write, PAUSE_RUN around the whole run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from apollo_grpc import traces
from apollo_grpc.errors import Aborted, ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine.pause import EnginePause
from apollo_trainer.weights.attachment import Attachment
from apollo_trainer.weights.sidecar import Sidecar

# Reasons of a call that nobody answers any more.
_GONE = ("ENGINE_LOST", "ENGINE_STOPPING", Unavailable.default_reason)


def engine_is_gone(error: ApolloError) -> bool:
    """Whether a failed call means that the engine is gone; one that is slow is still there."""
    return isinstance(error, Unavailable) and error.reason in _GONE


def version_changed(live: int, expected: int) -> Aborted:
    """The error where a call expects another version of the weights than the live one."""
    return Aborted(
        f"The live weights have version {live}, not {expected}; nothing was changed. Look at what "
        "was learned meanwhile, then ask again.",
        reason="WEIGHT_VERSION_CHANGED",
        metadata={"weight_version": str(live)},
    )


class Coherence(ABC):
    """The part that all modes share; one object a run. Training thread.

    Call `begin`, then for each step `before_write` (any number of times) and `after_step`, at last
    `end`. All raise the sidecar's error, and `before_write` whatever forbids the write.

    Attributes:
        stops: whether vLLM waits while a lease lasts.
        serves: whether vLLM decodes between two writes.
        held_seconds: how long vLLM was paused for the run so far.
        step_held_seconds: how long for the last step alone.
        weight_version: the last one that the sidecar told of; None before.
        untold: whether the sidecar will count an update that it could not be told of.
    """

    stops = serves = True

    def __init__(self, sidecar: Sidecar, attachment: Attachment, seconds: float, policy: Any):
        self._sidecar, self._attachment, self._seconds = sidecar, attachment, seconds
        policy = policy or pb.CACHE_POLICY_RESET_AT_END
        self._resets_each_step = policy == pb.CACHE_POLICY_RESET_EACH_STEP
        self._resets_at_end = policy != pb.CACHE_POLICY_KEEP
        self._pause: EnginePause | None = None
        # Whole updates that vLLM has not been told of, and whether its caches may be of older
        # weights, by an unfinished update too.
        self._updates, self._dirty, self._wrote = 0, False, False
        self.held_seconds = self.step_held_seconds = 0.0
        self.weight_version: int | None = None
        self.untold = False

    def begin(self) -> None:  # noqa: B027
        """Prepares for the first step."""

    def before_write(self) -> None:
        """Makes sure, right before weights are written, that they may be.

        Raises Unavailable where the engine is gone, FailedPrecondition where it went on early, or
        with WEIGHTS_CHANGED where somebody else changed its weights.
        """
        self._attachment.require_live()
        self._require_there()
        self._hold()
        if not self._wrote:
            self._attachment.require_as_left()
        self._wrote = self._dirty = True

    def _require_there(self) -> None:
        """Raises Unavailable once the engine is lost: a wedged one would answer nothing for long.

        Its sidecar drops what it cached when it hears that this training server has left it.
        """
        if self._attachment.gone:
            raise Unavailable("vLLM is gone, or does not answer.", reason="ENGINE_LOST")

    @abstractmethod
    def after_step(self) -> None:
        """Tells vLLM of the step's update, which is whole."""

    def end(self) -> None:
        """Lets vLLM go on after the last step, whole or not; drops caches as the policy says."""
        try:
            if self._wrote:
                self._attachment.remember()
        finally:
            self._end()

    @abstractmethod
    def _end(self) -> None:
        """What `end` does in this mode."""

    def _acquire(self) -> EnginePause:
        self._pause = EnginePause(self._sidecar, self._attachment, self._seconds, stops=self.stops)
        return self._pause

    def _hold(self) -> None:
        """Acquires the lease where there is none; raises where it has ended."""
        pause = self._pause or self._acquire()
        pause.confirm()
        lost = pause.lost
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
        self.untold = changed = self._dirty = bool(self._dirty or self._updates)
        try:
            self.weight_version = pause.end(
                weights_changed=changed, updates=self._updates, keep_caches=not reset_caches
            )
            self.untold = False
            # Caches that vLLM did not drop are still to be dropped at the end.
            self._dirty = changed and not reset_caches
        finally:
            self._count(pause)
            self._updates = 0

    def _count(self, pause: EnginePause) -> None:
        self.step_held_seconds = pause.held_seconds
        self.held_seconds += self.step_held_seconds

    def _reset_caches(self) -> None:
        if self._dirty:
            self._require_there()
            self._sidecar.reset_caches(self._attachment.epoch)
            self._dirty = False


class Live(Coherence):
    """Writes while vLLM decodes; the sidecar knows, and counts an update if the writer dies."""

    stops = False

    def _hold(self) -> None:
        super()._hold()
        self.untold = True

    def after_step(self) -> None:
        """Counts one update more."""
        self._attachment.synchronize()
        self._require_there()
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


class PauseRun(Coherence):
    """vLLM waits for the whole run; no step holds it alone."""

    serves = False
    _span = traces.Span()

    def _count(self, pause: EnginePause) -> None:
        self.held_seconds += pause.held_seconds

    def begin(self) -> None:
        """Pauses vLLM."""
        self._acquire()
        self._span = traces.begin("pause")

    def after_step(self) -> None:
        """Tells vLLM at the end alone: it reads nothing before."""
        self._updates += 1

    def _end(self) -> None:
        """Lets vLLM go on."""
        try:
            self._release(reset_caches=self._resets_at_end)
        finally:
            self._span.end()


class PauseStep(Coherence):
    """vLLM decodes during forward and backward, and waits while weights are written."""

    def after_step(self) -> None:
        """Lets vLLM go on with the update."""
        self._updates += 1
        self._release(reset_caches=self._resets_each_step)

    def _end(self) -> None:
        """Ends the pause of a step that failed, and resets what the policy says."""
        self._release(reset_caches=self._resets_at_end)
        if self._resets_at_end:
            self._reset_caches()


_MODES: dict[pb.CoherenceMode.ValueType, type[Coherence]] = {
    pb.COHERENCE_MODE_UNSPECIFIED: Live,
    pb.COHERENCE_MODE_PAUSE_RUN: PauseRun,
    pb.COHERENCE_MODE_PAUSE_STEP: PauseStep,
    pb.COHERENCE_MODE_LIVE: Live,
}
# What a spec may ask for.
COHERENCE_MODES = [mode for mode in _MODES if mode]


def coherence_of(
    asked: pb.Coherence, sidecar: Sidecar, attachment: Attachment, lease_seconds: float
) -> Coherence:
    """Makes the mode and cache policy of a spec; unset they are LIVE and RESET_AT_END."""
    return _MODES[asked.mode](sidecar, attachment, lease_seconds, asked.cache_policy)
