"""Executes one run on the training thread: started, steps, state to disk, finished."""

from __future__ import annotations

import logging
import threading
import time

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.times import duration
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import CapturedState, ModelOwner, Saved, Session, StatusBoard
from apollo_trainer.ledger import EventLog
from apollo_trainer.optim.ahead import compile_ahead
from apollo_trainer.runs.evaluation import Evaluation
from apollo_trainer.runs.probing import Rejected
from apollo_trainer.runs.run import Batch, PreparedRun
from apollo_trainer.runs.saving import RunSaves
from apollo_trainer.runs.steps import RunSteps, engine_lost, step_event
from apollo_trainer.runs.way_back import WayBack
from apollo_trainer.training.filter import learning_only
from apollo_trainer.training.guard import LossReached
from apollo_trainer.training.step import StepResult
from apollo_trainer.weights.written import require_written_is_live

log = logging.getLogger(__name__)


class RunCancelled(Exception):
    """Somebody asked the run to stop."""


class Execution:
    """One run while it is executed.

    Args:
        owner: of the model; its `stopping` ends the run after the step at work.
        cancelled: set when the run is to stop, before its next micro-batch.
    """

    def __init__(
        self,
        session: Session,
        owner: ModelOwner,
        board: StatusBoard,
        log: EventLog,
        run: PreparedRun,
        cancelled: threading.Event,
    ):
        self._session, self._owner, self._board = session, owner, board
        self._log, self._run, self._cancelled = log, run, cancelled
        self._began = time.monotonic()
        self._saves = RunSaves(
            session, owner.saver, log, run.steps_total, self._require_going, self._warn
        )
        self._steps: RunSteps | None = None
        self._way_back: WayBack | None = None
        self._finished = pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED)
        self._state: CapturedState | None = None

    @property
    def steps_done(self) -> int:
        """Steps of the run that are in the weights."""
        return self._steps.written if self._steps else 0

    def execute(self) -> None:
        """Runs to the end; every way out ends the log with `finished`, and none raises.

        `finished` follows once the Apollo state is on disk; the next run may have begun by then.
        """
        failure = self._failure()
        self._finished.steps_done = self.steps_done
        if failure:
            self._finished.ClearField("stopped")
            self._finished.failure.CopyFrom(failure)
        if self._way_back is not None:
            self._take_back(self._way_back)
        self._show_end()
        if self._state is None:
            self._log.append(finished=self._finished)
        else:
            self._owner.saver.save(self._state, self._end)

    def _failure(self) -> pb.Notice | None:
        """Trains; returns why that failed, and sets the state that the run ends in."""
        try:
            self._train()
            return None
        except RunCancelled:
            self._finished.state = pb.RUN_STATE_CANCELLED
            return None
        except Rejected as rejected:
            self._finished.state = pb.RUN_STATE_REJECTED
            return rejected.failure
        except ApolloError as error:
            self._finished.state = pb.RUN_STATE_FAILED
            return pb.Notice(reason=error.reason, message=error.message)
        except Exception:
            log.exception("run %s failed", self._log.run_id)
            self._finished.state = pb.RUN_STATE_FAILED
            return pb.Notice(
                reason="INTERNAL",
                message=f"The step after {self.steps_done} written ones failed by a mistake of the "
                "server's; its log has the details.",
            )

    def _end(self, saved: Saved) -> None:
        self._saves.tell(saved)
        self._log.append(finished=self._finished)

    def _show_end(self) -> None:
        """Before `finished` is told: who reads it and asks for the status must not see the run."""
        if self._session.attachment.alive:
            self._board.show(self._session, active_run_id="")
        else:
            self._board.update(active_run_id="")

    def _train(self) -> None:
        self._require_going()
        sidecar, going = self._owner.sidecar, self._require_going
        looks = Evaluation(self._session, sidecar, self._log, self._run, going, self._warn)
        if self._run.dry_run:
            with self._session.trying(self._run.options, self._run.steps_total):
                self._take_steps(looks)
            return
        if self._run.accept_if is not None:
            self._begin_way_back()
        self._session.begin_run(self._run.options, self._run.steps_total)
        if self._run.options.reset:
            self._session.checkpoints.forget_updates()
        self._saves.begin()
        try:
            self._take_steps(looks)
        finally:
            self._state = self._saves.end(self.steps_done)
        if self._way_back is not None:
            looks.require_accepted()
            self._way_back.forget()
            self._way_back = None

    def _begin_way_back(self) -> None:
        way_back = WayBack(
            self._session, self._owner, self._board, self._log.run_id, self._require_going
        )
        way_back.begin()
        self._way_back = way_back

    def _take_back(self, way_back: WayBack) -> None:
        """Puts back what a run wrote that was not accepted, whatever ended it."""
        self._state = None
        try:
            self._finished.steps_done = 0
            restored = way_back.take(self._finished)
        except (ApolloError, OSError) as error:
            log.error("run %s was not taken back: %s", self._log.run_id, error)
            self._session.checkpoints.doubt(f"run {self._log.run_id} was not taken back ({error}).")
            self._finished.steps_done = self.steps_done
            self._finished.failure.message += f" It could not be taken back: {error}"
            return
        if restored is not None:
            self._finished.weight_version = restored.weight_version
            for warning in restored.warnings:
                self._warn(warning.reason, warning.message)
            way_back.forget_snapshot()

    def _take_steps(self, looks: Evaluation) -> None:
        """From `started` to the last step's, and what vLLM says to that."""
        self._tell_started()
        model = self._session.attachment.model
        with learning_only(model, self._run.learning.names(model)):
            looks.begin()
            self._run = looks.run
            # Begun at the attachment; what is left of it must not be waited for with vLLM paused.
            compile_ahead(self._session.optimizer)
            self._take_all(looks)
            looks.end(self.steps_done)

    def _take_all(self, looks: Evaluation) -> None:
        steps = self._steps = RunSteps(
            self._session,
            self._owner.sidecar,
            self._log,
            self._run,
            self._require_going,
            self._warn,
        )
        try:
            steps.begin()
            self._take_each(steps, looks)
        except LossReached:
            self._finished.stopped.CopyFrom(self._learned())
        finally:
            try:
                steps.end()
            finally:
                self._finished.pause_time.CopyFrom(duration(steps.coherence.held_seconds))
            self._finish_version(steps)
            self._require_written_is_live()

    def _take_each(self, steps: RunSteps, looks: Evaluation) -> None:
        turns = self._run.anchor_turns()
        for number, batch in enumerate(self._run.batches(turns), 1):
            self._require_going()
            self._tell(number, batch, result := steps.take(batch), steps)
            turns.saw(result.anchor_losses)
            if not self._run.dry_run:
                self._saves.after_step(number)
            looks.after_step(number)

    def _learned(self) -> pb.Notice:
        return pb.Notice(
            reason="GUARD_MIN_LOSS",
            message=f"All samples are learned: the latest loss of each was below "
            f"{self._run.guard.min_loss:g} nats a token (guard.min_loss). {self.steps_done} of "
            f"{self._run.steps_total} steps were taken and are kept; more would spoil what the "
            "model knew. With min_loss 0 every step is taken.",
        )

    def _require_written_is_live(self) -> None:
        """Cancelled and failed runs wrote, too. Raises FailedPrecondition with WEIGHTS_NOT_LIVE."""
        attachment = self._session.attachment
        if self._run.dry_run or not self.steps_done or not attachment.alive:
            return
        sample = self._run.samples[0]
        trained = (*sample.context_ids[-1:], *sample.continuation_ids)
        try:
            require_written_is_live(self._owner.sidecar, attachment, trained)
        except Unavailable as error:
            self._warn(
                "LIVENESS_NOT_COMPARED",
                f"It was not seen whether vLLM computes with what was written ({error.message}); "
                "the next run's end compares again.",
            )
        except FailedPrecondition:
            self._board.update(
                attachment=status_pb2.ATTACHMENT_STATE_REFUSED,
                attachment_detail=f"{attachment.not_live} (WEIGHTS_NOT_LIVE)",
                optimizer_loaded=False,
            )
            raise

    def _tell_started(self) -> None:
        self._log.append(
            started=pb.RunEvent.Started(
                steps_total=self._run.steps_total,
                optimizer_step=self._session.optimizer.step_count,
                weight_version=self._session.weight_version,
                engine_epoch=self._session.attachment.epoch,
                dry_run=self._run.dry_run,
            )
        )

    def _finish_version(self, steps: RunSteps) -> None:
        version, untold = steps.coherence.weight_version, steps.coherence.untold
        if untold or version is None:
            # What is written counts from now on, not from when a lease has run out.
            version = self._session.weight_version + untold
        self._finished.weight_version = version
        self._session.count_version(version)
        self._board.show_version(self._session)

    def _tell(self, number: int, batch: Batch, result: StepResult, steps: RunSteps) -> None:
        dry_run = self._run.dry_run
        self._log.append(step=step_event(number, batch, result, steps, dry_run=dry_run))
        if version := steps.coherence.weight_version:
            self._session.count_version(version)
        self._board.show_version(self._session, optimizer_step=result.optimizer_step)
        if result.skipped_tensors:
            self._warn(
                "TENSORS_SKIPPED",
                f"{result.skipped_tensors} tensors were left as they were in step {number}: their "
                "gradient was not finite when it was computed again. Look at the device.",
            )

    def _warn(self, reason: str, message: str) -> None:
        log.warning("run %s: %s (%s)", self._log.run_id, message, reason)
        self._log.append(warning=pb.Notice(reason=reason, message=message))

    def _require_going(self) -> None:
        """Raises what is to end the run now."""
        self._session.attachment.require_live()
        if self._session.attachment.gone:
            raise engine_lost(self.steps_done)
        if self._owner.stopping.is_set():
            raise Unavailable(
                f"The server was stopped after {self.steps_done} of {self._run.steps_total} steps; "
                "those are in the weights and in the Apollo state.",
                reason="SERVER_STOPPED",
            )
        if self._cancelled.is_set():
            raise RunCancelled
        limit = self._run.max_seconds
        if limit is not None and time.monotonic() - self._began >= limit:
            raise FailedPrecondition(
                f"The run had its max_wall_time of {limit:g} s; {self.steps_done} of "
                f"{self._run.steps_total} steps are in the weights and in the Apollo state. Send "
                "what is left as a new run.",
                reason="DEADLINE",
            )
