"""Executes one run on the training thread: started, steps, state to disk, finished."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from apollo_grpc.errors import ApolloError, FailedPrecondition, ResourceExhausted, Unavailable
from apollo_grpc.times import duration
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import Covered
from apollo_trainer.checkpoints.snapshots import SnapshotInfo
from apollo_trainer.engine import CapturedState, Saved, Session, StateSaver, StatusBoard
from apollo_trainer.optim.ahead import compile_ahead
from apollo_trainer.runs.events import EventLog
from apollo_trainer.runs.run import PreparedRun
from apollo_trainer.runs.steps import RunSteps, engine_lost
from apollo_trainer.training.evaluate import evaluate
from apollo_trainer.training.guard import LossReached
from apollo_trainer.training.step import StepResult
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.written import require_written_is_live

log = logging.getLogger(__name__)
_FULL_GRADIENTS = {
    "": pb.FULL_GRADIENTS_UNSPECIFIED,
    "LONG_STEP": pb.FULL_GRADIENTS_LONG_STEP,
}


class RunCancelled(Exception):
    """Somebody asked the run to stop."""


@dataclass
class Execution:
    """One run while it is executed.

    Attributes:
        saver: puts the Apollo state on disk.
        stopping: set when the server is to stop; the run then ends after the step at work.
        cancelled: set when the run is to stop, before its next micro-batch.
    """

    session: Session
    sidecar: Sidecar
    board: StatusBoard
    log: EventLog
    run: PreparedRun
    saver: StateSaver
    stopping: threading.Event
    cancelled: threading.Event
    _began: float = field(default_factory=time.monotonic)
    _saved_at: float = field(default_factory=time.monotonic)
    _steps: RunSteps | None = None
    _finished: pb.Finished = field(default_factory=pb.Finished)
    _state: CapturedState | None = None
    _skipping: bool = False

    @property
    def steps_done(self) -> int:
        """Steps of the run that are in the weights."""
        return self._steps.written if self._steps else 0

    def execute(self) -> None:
        """Runs to the end; every way out ends the log with `finished`, and none raises.

        `finished` follows once the Apollo state is on disk; the next run may have begun by then.
        """
        self._finish(self._outcome())
        self._show_end()
        if self._state is None:
            self.log.append(finished=self._finished)
        else:
            self.saver.save(self._state, self._end)

    def _outcome(self) -> pb.Failure | None:
        """Trains; returns why that failed. A run that was cancelled has its state set."""
        failure: pb.Failure | None = None
        self._finished.state = pb.RUN_STATE_SUCCEEDED
        try:
            self._train()
        except RunCancelled:
            self._finished.state = pb.RUN_STATE_CANCELLED
        except ApolloError as error:
            failure = pb.Failure(reason=error.reason, message=error.message)
        except Exception:
            log.exception("run %s failed", self.log.run_id)
            failure = pb.Failure(
                reason="INTERNAL",
                message=f"The step after {self.steps_done} written ones failed by a mistake of the "
                "server's; its log has the details.",
            )
        return failure

    def _finish(self, failure: pb.Failure | None) -> None:
        self._finished.steps_done = self.steps_done
        if failure:
            self._finished.state = pb.RUN_STATE_FAILED
            self._finished.failure.CopyFrom(failure)

    def _end(self, saved: Saved) -> None:
        self._tell_saved(saved)
        self.log.append(finished=self._finished)

    def _show_end(self) -> None:
        """Before `finished` is told: who reads it and asks for the status must not see the run."""

        def change(status: status_pb2.ServerStatus) -> None:
            status.active_run_id = ""
            if self.session.attachment.alive:
                self.session.show(status)

        self.board.update(change)

    def _train(self) -> None:
        self._require_going()
        if self.run.dry_run:
            with self.session.trying(self.run.options):
                self._take_steps()
            return
        self.session.begin_run(self.run.options)
        if self.run.options.reset:
            self.session.checkpoints.forget_updates()
        self._require_saved()
        if self.session.settings.snapshot_before_runs:
            self._wait_for_snapshots()
            self._snapshot()
        try:
            self._take_steps()
        finally:
            self._cover()
            if self.session.attachment.alive:
                # Of weights that are gone the state on disk stays that of before the run.
                self._state = self.session.capture(running=False)

    def _cover(self) -> None:
        """What the state knows of this run, before it is saved."""
        self.session.covered = Covered(self.log.run_id, self.steps_done)

    def _take_steps(self) -> None:
        """From `started` to the last step's, and what vLLM says to that."""
        self._tell_started()
        self._evaluate(after_training=False)
        # Begun at the attachment; what is left of it must not be waited for with vLLM paused.
        compile_ahead(self.session.optimizer)
        steps = self._steps = RunSteps(
            self.session, self.sidecar, self.log, self.run, self._require_going, self._warn
        )
        try:
            steps.begin()
            self._take_each(steps)
        except LossReached:
            self._finished.stopped.CopyFrom(self._learned())
        finally:
            try:
                steps.end()
            finally:
                self._finished.pause_time.CopyFrom(duration(steps.held_seconds))
            self._show_version(steps.weight_version, untold=steps.untold)
            self._require_written_is_live()
        self._evaluate(after_training=True)

    def _take_each(self, steps: RunSteps) -> None:
        for number, samples in enumerate(self.run.batches(), 1):
            self._require_going()
            self._tell(number, steps.take(samples))
            if not self.run.dry_run:
                self._save_while_running()
                self._snapshot_while_running(number)

    def _learned(self) -> pb.Stopped:
        return pb.Stopped(
            reason="GUARD_MIN_LOSS",
            message=f"All samples are learned: the latest loss of each was below "
            f"{self.run.guard.min_loss:g} nats a token (guard.min_loss). {self.steps_done} of "
            f"{self.run.steps_total} steps were taken and are kept; more would spoil what the "
            "model knew. With min_loss 0 every step is taken.",
        )

    def _require_written_is_live(self) -> None:
        """Cancelled and failed runs wrote, too. Raises FailedPrecondition with WEIGHTS_NOT_LIVE."""
        attachment = self.session.attachment
        if self.run.dry_run or not self.steps_done or not attachment.alive:
            return
        try:
            require_written_is_live(self.sidecar, attachment, self._trained_tokens())
        except Unavailable as error:
            self._warn(
                "LIVENESS_NOT_COMPARED",
                f"It was not seen whether vLLM computes with what was written ({error.message}); "
                "the next run's end compares again.",
            )
        except FailedPrecondition:
            self.board.update(
                attachment=status_pb2.ATTACHMENT_STATE_REFUSED,
                attachment_detail=f"{attachment.not_live} (WEIGHTS_NOT_LIVE)",
                optimizer_loaded=False,
            )
            raise

    def _trained_tokens(self) -> tuple[int, ...]:
        sample = self.run.samples[0]
        return (*sample.context_ids[-1:], *sample.continuation_ids)

    def _tell_started(self) -> None:
        self.log.append(
            started=pb.Started(
                steps_total=self.run.steps_total,
                optimizer_step=self.session.optimizer.step_count,
                weight_version=self.board.snapshot().weight_version,
                engine_epoch=self.session.attachment.epoch,
                dry_run=self.run.dry_run,
            )
        )

    def _evaluate(self, *, after_training: bool) -> None:
        """Reads only: vLLM decodes meanwhile."""
        if not self.run.evaluate:
            return
        losses = evaluate(
            self.session.attachment.model,
            self.run.samples,
            self.session.settings.token_budget,
            self._require_going,
        )
        self.log.append(evaluated=pb.Evaluated(after_training=after_training, losses=losses))

    def _show_version(self, version: int | None, *, untold: bool) -> None:
        if untold or version is None:
            # What is written counts from now on, not from when a lease has run out.
            version = self.board.snapshot().weight_version + untold
        self._finished.weight_version = version
        self.board.update(weight_version=version)

    def _warn(self, reason: str, message: str) -> None:
        log.warning("run %s: %s (%s)", self.log.run_id, message, reason)
        self.log.append(warning=pb.Warning(reason=reason, message=message))

    def _require_going(self) -> None:
        self.session.attachment.require_live()
        if self.session.attachment.gone:
            raise engine_lost(self.steps_done)
        if self.stopping.is_set():
            raise Unavailable(
                f"The server was stopped after {self.steps_done} of {self.run.steps_total} steps; "
                "those are in the weights and in the Apollo state.",
                reason="SERVER_STOPPED",
            )
        if self.cancelled.is_set():
            raise RunCancelled
        limit = self.run.max_seconds
        if limit is not None and time.monotonic() - self._began >= limit:
            raise FailedPrecondition(
                f"The run had its max_wall_time of {limit:g} s; {self.steps_done} of "
                f"{self.run.steps_total} steps are in the weights and in the Apollo state. Send "
                "what is left as a new run.",
                reason="DEADLINE",
            )

    def _tell(self, number: int, result: StepResult) -> None:
        held = 0.0 if self._steps is None else self._steps.step_held_seconds
        self.log.append(step=_step_event(number, result, held, dry_run=self.run.dry_run))
        self.board.update(optimizer_step=result.optimizer_step)
        if self._steps and self._steps.weight_version is not None:
            self.board.update(weight_version=self._steps.weight_version)
        if result.skipped_tensors:
            self._warn(
                "TENSORS_SKIPPED",
                f"{result.skipped_tensors} tensors were left as they were in step {number}: their "
                "gradient was not finite when it was computed again. Look at the device.",
            )

    def _require_saved(self) -> None:
        """Before the first write with a state that no file on disk is like, as after a reset.

        A server that is killed would otherwise go on with the old one.
        """
        if self.session.on_disk:
            return
        if error := self.session.save(self.saver, running=True):
            raise FailedPrecondition(
                f"The new Apollo state could not be written ({error}); nothing was trained. "
                "Make room in the server's state folder, then send the run again.",
                reason="STATE_NOT_SAVED",
            )

    def _save_while_running(self) -> None:
        """Every so often, unless a save is still at work."""
        settings, session = self.session.settings, self.session
        steps = session.optimizer.step_count - session.captured_step
        is_due = bool(settings.save_steps) and steps >= settings.save_steps
        if settings.save_seconds:
            is_due |= time.monotonic() - self._saved_at >= settings.save_seconds
        if is_due and self.saver.idle:
            self._saved_at = time.monotonic()
            self._cover()
            self.saver.save(session.capture(running=True), self._tell_saved)

    def _snapshot_while_running(self, step: int) -> None:
        every = self.session.settings.snapshot_steps
        if every and step % every == 0 and step < self.run.steps_total:
            self._snapshot()

    def _wait_for_snapshots(self) -> None:
        """What the run is to be undone with must not be left out because one is at work."""
        while at_work := self.session.checkpoints.snapshot_at_work:
            self._require_going()
            wait([at_work], timeout=0.1)

    def _snapshot(self) -> None:
        """An automatic one, which training does not wait for."""
        session = self.session
        extra = session.extra(self.board.snapshot().weight_version)
        try:
            session.checkpoints.snapshot(session.optimizer, extra).add_done_callback(
                self._tell_snapshot
            )
            self._skipping = False
        except ResourceExhausted:
            self._tell_skipped()
        except (OSError, Unavailable) as error:
            self._warn("SNAPSHOT_NOT_TAKEN", f"No snapshot can be taken here ({error}).")

    def _tell_skipped(self) -> None:
        """Once for all that are skipped in a row: one an event would double a run's events."""
        if not self._skipping:
            self._skipping = True
            self._warn(
                "SNAPSHOT_SKIPPED",
                f"After {self.steps_done} steps no snapshot was taken: the one before is still "
                "being written, and until it is the next ones are skipped too. Take them at longer "
                "intervals (snapshot_steps), or on a faster disk.",
            )

    def _tell_snapshot(self, future: Future[SnapshotInfo]) -> None:
        # The run may have ended: a snapshot is no event of it then.
        if error := future.exception():
            log.warning("run %s: a snapshot was not taken: %s", self.log.run_id, error)

    def _tell_saved(self, saved: Saved) -> None:
        if saved.error:
            message = (
                f"The Apollo state could not be written ({saved.error}); the one on disk is an "
                "earlier one. Make room; it is written again at the end of the run or of the next."
            )
            self._warn("STATE_NOT_SAVED", message)
            return
        written = pb.CheckpointWritten(
            optimizer_step=saved.optimizer_step, size_bytes=saved.size_bytes
        )
        self.log.append(checkpoint=written)


def _step_event(number: int, result: StepResult, held: float, *, dry_run: bool) -> pb.Step:
    times: dict[str, Any] = {
        "forward_time": duration(result.forward_seconds),
        "backward_time": duration(result.backward_seconds),
        "optimizer_time": duration(result.optimizer_seconds),
        "pause_time": duration(held),
    }
    return pb.Step(
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
        **times,
    )
