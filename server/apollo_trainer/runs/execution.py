"""Executes one run on the training thread: pause, steps, resume, state to disk, finished."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.runs.events import EventLog, duration
from apollo_trainer.runs.pause import EnginePause
from apollo_trainer.runs.run import PreparedRun
from apollo_trainer.runs.session import Session
from apollo_trainer.runs.state_saver import CapturedState, Saved, StateSaver
from apollo_trainer.runs.status_board import StatusBoard
from apollo_trainer.training.release import StepIncomplete
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepResult, take_step
from apollo_trainer.weights.sidecar import Sidecar

log = logging.getLogger(__name__)
# Reasons of a call that nobody answers any more.
_GONE = (Unavailable.default_reason, "ENGINE_STOPPING")


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
    steps_done: int = 0
    _began: float = field(default_factory=time.monotonic)
    _saved_at: float = field(default_factory=time.monotonic)
    _weights_changed: bool = False
    _writing: bool = False
    _finished: pb.Finished = field(default_factory=pb.Finished)
    _state: CapturedState | None = None

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
        self.session.begin_run(self.run.options)
        self._require_saved()
        self.log.append(
            started=pb.Started(
                steps_total=self.run.steps_total,
                optimizer_step=self.session.optimizer.step_count,
                weight_version=self.board.snapshot().weight_version,
                engine_epoch=self.session.attachment.epoch,
            )
        )
        lease_seconds = self.session.settings.lease_seconds
        pause = EnginePause(self.sidecar, self.session.attachment, lease_seconds)
        # A step takes long enough for vLLM to go, or to go on, between its beginning and its write.
        self.session.optimizer.before_write = lambda: self._before_write(pause)
        try:
            for samples in self.run.batches():
                self._require_going()
                self._require_writable(pause)
                result = self._step(samples)
                self.steps_done += 1
                self._tell(result)
                self._save_while_running()
        finally:
            self.session.optimizer.before_write = lambda: None
            self._resume(pause)
            if self.session.attachment.alive:
                # Of weights that are gone the state on disk stays that of before the run.
                self._state = self.session.capture(running=False)

    def _before_write(self, pause: EnginePause) -> None:
        """Asked before each part of a step is written."""
        if not self.session.attachment.alive:
            raise self._engine_lost()
        if self._writing:
            # A pause that is lost halfway is no reason to leave half a step in the weights.
            return
        self._require_writable(pause)
        self.log.begin_step(self.steps_done + 1)
        self._writing = True

    def _step(self, samples: tuple[TokenizedSample, ...]) -> StepResult:
        before, self._weights_changed = self._weights_changed, True
        self._writing = False
        try:
            return take_step(self.session.attachment.model, self.session.optimizer, samples)
        except StepIncomplete as error:
            if not self.session.attachment.alive:
                raise self._engine_lost() from error
            raise
        except BaseException:
            # Nothing of this step was written.
            self._weights_changed = before
            raise

    def _resume(self, pause: EnginePause) -> None:
        try:
            changed = self._weights_changed
            version = pause.end(weights_changed=changed, updates=self.steps_done)
        except ApolloError as error:
            if error.reason in _GONE or not self.session.attachment.alive:
                self.session.attachment.lost.set()
                raise self._engine_lost() from error
            self._warn(error.reason, error.message)
        else:
            self._finished.weight_version = version
            self.board.update(weight_version=version)
        self._finished.pause_time.CopyFrom(duration(pause.held_seconds))

    def _warn(self, reason: str, message: str) -> None:
        log.warning("run %s: %s (%s)", self.log.run_id, message, reason)
        self.log.append(warning=pb.Warning(reason=reason, message=message))

    def _require_going(self) -> None:
        if not self.session.attachment.alive:
            raise self._engine_lost()
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

    def _require_writable(self, pause: EnginePause) -> None:
        if not self.session.attachment.alive:
            raise self._engine_lost()
        lost = pause.lost
        if isinstance(lost, Unavailable):
            # Known here before the watch knows; the state must not be saved as that of weights
            # that are gone.
            self.session.attachment.lost.set()
            raise self._engine_lost()
        if lost:
            raise FailedPrecondition(
                f"vLLM went on before the run was done ({lost.message}); "
                f"{self.steps_done} steps are in the weights. Send the run again.",
                reason="PAUSE_LOST",
            )

    def _engine_lost(self) -> Unavailable:
        return Unavailable(
            f"vLLM is gone; {self.steps_done} steps were written to weights that are gone with it. "
            "The model directory and the Apollo state on disk are as they were before the run. "
            "Start vLLM again and send the run anew.",
            reason="ENGINE_LOST",
        )

    def _tell(self, result: StepResult) -> None:
        self.log.append(step=_step_event(self.steps_done, result))
        self.board.update(optimizer_step=result.optimizer_step)

    def _require_saved(self) -> None:
        """Before the first write with a state that no file on disk is like, as after a reset.

        A server that is killed would otherwise go on with the old one.
        """
        if self.session.on_disk:
            return
        saved = self.saver.save_and_wait(self.session.capture(running=True))
        if saved.error:
            raise FailedPrecondition(
                f"The new Apollo state could not be written ({saved.error}); nothing was trained. "
                "Make room in the server's state folder, then send the run again.",
                reason="STATE_NOT_SAVED",
            )
        self.session.on_disk = True

    def _save_while_running(self) -> None:
        """Every so often, unless a save is still at work."""
        settings, session = self.session.settings, self.session
        steps = session.optimizer.step_count - session.captured_step
        is_due = bool(settings.save_steps) and steps >= settings.save_steps
        if settings.save_seconds:
            is_due |= time.monotonic() - self._saved_at >= settings.save_seconds
        if is_due and self.saver.idle:
            self._saved_at = time.monotonic()
            self.saver.save(session.capture(running=True), self._tell_saved)

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


def _step_event(step: int, result: StepResult) -> pb.Step:
    times: dict[str, Any] = {
        "forward_time": duration(result.forward_seconds),
        "backward_time": duration(result.backward_seconds),
        "optimizer_time": duration(result.optimizer_seconds),
        "pause_time": duration(0),
    }
    return pb.Step(
        step=step,
        loss=result.loss,
        loss_sum=result.loss_sum,
        tokens=result.tokens,
        grad_norm=result.grad_norm,
        update_norm=result.update_norm,
        learning_rate=result.learning_rate,
        changed_fraction=result.changed_fraction,
        optimizer_step=result.optimizer_step,
        **times,
    )
