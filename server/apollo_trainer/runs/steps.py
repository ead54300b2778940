"""The steps of one run: trained, written as its coherence says, and told to vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from apollo_grpc.errors import ApolloError, FailedPrecondition, ResourceExhausted, Unavailable
from apollo_grpc.times import duration
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import Session, coherence_of, engine_is_gone
from apollo_trainer.ledger import EventLog
from apollo_trainer.runs.run import Batch, PreparedRun
from apollo_trainer.training.guard import Unlearned
from apollo_trainer.training.incomplete import StepIncomplete
from apollo_trainer.training.out_of_memory import OutOfMemory
from apollo_trainer.training.step import StepResult, take_step
from apollo_trainer.training.step_policy import StepPolicy
from apollo_trainer.weights.sidecar import Sidecar

_FULL_GRADIENTS = {
    "": pb.FULL_GRADIENTS_UNSPECIFIED,
    "LONG_STEP": pb.FULL_GRADIENTS_LONG_STEP,
}
# Each step's losses by sample go to every reader, and to the disk.
MAX_TOLD_SAMPLES = 256


class RunSteps:
    """Takes a run's steps; those of a dry run neither pause vLLM nor write anything.

    Call `begin`, `take` for each step, and `end` in any case. All raise Unavailable with
    ENGINE_LOST once vLLM is gone. Training thread.

    Args:
        require_going: called before each micro-batch; what it raises ends the step unwritten.
        warn: called with a reason and a message where vLLM was not told of what was written.

    Attributes:
        written: whole steps that are in the weights.
        coherence: how long vLLM was held, and the weight version that it tells.
        waited_seconds: of the last step, for its turn.
    """

    def __init__(
        self,
        session: Session,
        sidecar: Sidecar,
        log: EventLog,
        run: PreparedRun,
        require_going: Callable[[], None],
        warn: Callable[[str, str], None],
    ):
        self._session, self._log, self._dry_run = session, log, run.dry_run
        self._require_going, self._warn = require_going, warn
        settings = session.settings
        self.coherence = coherence_of(
            run.coherence, sidecar, session.attachment, settings.lease_seconds
        )
        # A dry run writes nothing that could be too much.
        guard = replace(run.guard, min_loss=0.0) if run.dry_run else run.guard
        self._policy = StepPolicy(
            settings.token_budget, guard, run.dry_run, run.loss.clip, run.options.clip_grad_norm,
            run.context_gradient_tokens,
        )  # fmt: skip
        self._anchor_weight = run.anchor_options.weight
        self._unlearned = Unlearned(run.samples, guard)
        self.written, self._writing, self.waited_seconds = 0, False, 0.0

    def begin(self) -> None:
        """Pauses vLLM where it is to wait for the whole run."""
        if self._dry_run:
            return
        # A step takes long enough for vLLM to go, or to go on, between its beginning and its write.
        self._session.optimizer.before_write = self._before_write
        self.coherence.begin()

    def take(self, batch: Batch) -> StepResult:
        """Takes one step in its turn, as `_take`."""
        pace = self._session.pace
        if not self.coherence.serves:
            with pace.paused_step() as self.waited_seconds:
                return self._take(batch)
        with pace.step(self._require_going) as self.waited_seconds, pace.place():
            return self._take(batch)

    def _take(self, batch: Batch) -> StepResult:
        """Takes one step. Raises as `take_step`, FailedPrecondition with PAUSE_LOST where vLLM
        went on early, and LossReached where all samples were learned before it.
        """
        self._writing = False
        result = self._train(batch)
        self._unlearned.took(batch.samples, result.loss)
        if not self._dry_run:
            self.written += 1
            self._tell(self.coherence.after_step)
        return result

    def end(self) -> None:
        """Lets vLLM go on."""
        if self._dry_run:
            return
        self._session.optimizer.before_write = lambda: None
        self._tell(self.coherence.end)

    def _train(self, batch: Batch) -> StepResult:
        attachment, optimizer = self._session.attachment, self._session.optimizer
        policy = replace(self._policy, guard=self._unlearned.guard_of(batch.samples))
        try:
            with self._session.checkpoints.recording(optimizer):
                return take_step(
                    attachment.model, optimizer, batch.samples, policy, self._require_going,
                    self._session.passes, batch.anchors, self._anchor_weight,
                )  # fmt: skip
        except OutOfMemory as error:
            needs = (*batch.samples, *batch.anchors)
            raise self._session.with_needs(error, needs) from error
        except (StepIncomplete, RuntimeError) as error:
            if not attachment.alive:
                raise self._lost() from error
            raise
        except OSError as error:
            raise ResourceExhausted(
                f"What has to be kept before a write could not be kept ({error}); nothing of the "
                f"step was written, {self.written} steps are in the weights. Make room, then send "
                "the run again.",
                reason="STEP_NOT_WRITTEN",
            ) from error

    def _before_write(self) -> None:
        """Called before each part of a step is written; what it raises forbids the write."""
        if not self._session.attachment.alive:
            raise self._lost()
        if self._writing:
            # A pause that is lost halfway is no reason to leave half a step in the weights.
            return
        try:
            self.coherence.before_write()
        except ApolloError as error:
            raise self._not_writable(error) from error
        if (part := self._session.pace.part) and self.coherence.stops:
            part.leave()
        if not self._session.attachment.alive:
            # Somebody changed them before the lease began, which refuses that.
            raise self._lost()
        self._log.begin_step(self.written + 1)
        self._writing = True

    def _not_writable(self, error: ApolloError) -> ApolloError:
        if self._is_lost(error):
            return self._lost()
        if error.reason == "PAUSE_LOST":
            return FailedPrecondition(
                f"{error.message}; {self.written} steps are in the weights. Send the run again.",
                reason="PAUSE_LOST",
            )
        return error

    def _tell(self, tell: Callable[[], None]) -> None:
        """Tells vLLM of what is written; where that fails it is a warning."""
        try:
            tell()
        except ApolloError as error:
            if self._is_lost(error):
                raise self._lost() from error
            self._warn(error.reason, error.message)

    def _lost(self) -> ApolloError:
        """Returns why nothing may be written any more."""
        if why := self._session.attachment.rank_ended:
            return Unavailable(
                f"{why} The run ends with {self.written} steps written; send it again once the "
                "engine is attached again.",
                reason="ENGINE_LOST",
            )
        try:
            self._session.attachment.require_live()
        except FailedPrecondition as error:
            return error
        return engine_lost(self.written)

    def _is_lost(self, error: ApolloError) -> bool:
        """Whether a call's error says that the engine is gone; the watch may not know it yet.

        Otherwise the state would be saved as that of weights that are gone.
        """
        attachment = self._session.attachment
        if attachment.alive and engine_is_gone(error):
            attachment.lost.set()
        return not attachment.alive


def engine_lost(written: int) -> Unavailable:
    """The error of a run whose engine is gone, after so many whole steps."""
    return Unavailable(
        f"vLLM is gone; {written} steps were written to weights that are gone with it. "
        "The model directory and the Apollo state on disk are as they were before the run. "
        "Start vLLM again and send the run anew.",
        reason="ENGINE_LOST",
    )


def step_event(
    number: int, batch: Batch, result: StepResult, steps: RunSteps, *, dry_run: bool
) -> pb.RunEvent.Step:
    """The event of the step that was taken last."""
    step = _event_of(number, result, steps, dry_run=dry_run)
    step.epoch = batch.epoch
    if len(batch.samples) <= MAX_TOLD_SAMPLES:
        step.sample_indices.extend(batch.indices)
        step.sample_losses.extend(result.sample_losses)
    if result.anchor_loss is not None:
        step.anchor_loss = result.anchor_loss
    if result.policy is not None:
        step.policy.CopyFrom(pb.PolicyFigures(**vars(result.policy)))
    return step


def _event_of(
    number: int, result: StepResult, steps: RunSteps, *, dry_run: bool
) -> pb.RunEvent.Step:
    return pb.RunEvent.Step(
        step=number,
        loss=result.loss,
        loss_sum=result.loss_sum,
        tokens=result.tokens,
        grad_norm=result.grad_norm,
        update_norm=result.update_norm,
        learning_rate=result.learning_rate,
        changed_fraction=result.changed_fraction,
        optimizer_step=result.optimizer_step,
        micro_batches=result.micro_batches,
        full_gradients=_FULL_GRADIENTS[result.full_gradients],
        dry_run=dry_run,
        forward_time=duration(result.forward_seconds),
        backward_time=duration(result.backward_seconds),
        optimizer_time=duration(result.optimizer_seconds),
        pause_time=duration(steps.coherence.step_held_seconds),
        wait_time=duration(steps.waited_seconds),
    )
