"""The one thread that owns the model: it attaches, trains, syncs and saves, one job at a time."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from apollo_grpc.errors import ApolloError, FailedPrecondition, ResourceExhausted, Unavailable
from apollo_grpc.v1 import status_pb2, training_pb2
from apollo_trainer.checkpoints.sync import Progress, SyncOutcome, sync_directory
from apollo_trainer.config import Settings
from apollo_trainer.runs.events import EventLog, now
from apollo_trainer.runs.execution import Execution
from apollo_trainer.runs.run import PreparedRun
from apollo_trainer.runs.session import KeptState, Session, open_session
from apollo_trainer.runs.status_board import StatusBoard
from apollo_trainer.training.options import StateShape
from apollo_trainer.weights.attach import MapReport, attach
from apollo_trainer.weights.sidecar import Sidecar

log = logging.getLogger(__name__)


class ModelOwner:
    """Runs wait here in order; everything that touches weights or optimizer happens on its thread.

    Args:
        sidecar: of the engine to train.
        board: told every change.
    """

    def __init__(self, sidecar: Sidecar, board: StatusBoard, settings: Settings):
        self._sidecar, self._board, self._settings = sidecar, board, settings
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: deque[str] = deque()
        self._active = 0
        self._losses = 0
        self._session: Session | None = None
        self._kept: KeptState | None = None
        self._found_epoch, self._attach_queued = "", False
        self._expected_shape: StateShape | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="training", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job of the training thread failed")

    # --- attachment -------------------------------------------------------------------------

    def session(self) -> Session:
        """The session now. Raises Unavailable, or FailedPrecondition when the map was refused."""
        session = self._session
        if session and session.attachment.alive:
            return session
        status = self._board.snapshot()
        if status.attachment == status_pb2.ATTACHMENT_STATE_REFUSED:
            raise FailedPrecondition(status.attachment_detail, reason="ATTACHMENT_REFUSED")
        raise Unavailable(
            f"{status.attachment_detail} Nothing was done.", reason="ENGINE_NOT_ATTACHED"
        )

    def engine_found(self, epoch: str) -> None:
        """Attaches to an engine, unless it is attached, about to be, or was refused.

        Called at every beat: an attachment that failed because the engine was busy is tried again.
        """
        with self._lock:
            lost = self._session is not None and not self._session.attachment.alive
            if self._attach_queued or (epoch == self._found_epoch and not lost):
                return
            self._found_epoch, self._attach_queued = epoch, True
            self._jobs.put(lambda: self._attach(epoch))

    def engine_lost(self, detail: str) -> None:
        """From now on nothing is written; called from any thread, also in mid-run."""
        with self._lock:
            self._losses, self._found_epoch = self._losses + 1, ""
            session = self._session
            self._jobs.put(self._let_go)
        if session:
            session.attachment.lost.set()
        self._board.update(
            attachment=status_pb2.ATTACHMENT_STATE_DETACHED,
            attachment_detail=detail,
            optimizer_loaded=False,
        )

    def _attach(self, epoch: str) -> None:
        with self._lock:
            self._attach_queued, losses = False, self._losses
        self._let_go()
        self._board.update(
            lambda status: status.ClearField("weight_map"),
            attachment=status_pb2.ATTACHMENT_STATE_ATTACHING,
            attachment_detail="vLLM was found; its weights are being mapped and verified.",
        )
        try:
            everything = self._settings.check_all_values
            attachment = attach(
                self._sidecar, epoch, check_all_values=everything, traced=self._show_map
            )
            session = open_session(attachment, self._settings, self._kept)
        except ApolloError as error:
            self._refuse(error)
            return
        except Exception as error:
            log.exception("the attachment failed")
            self._refuse(
                FailedPrecondition(
                    f"The attachment failed by a mistake of the server's ({type(error).__name__}); "
                    "its log has the details. Nothing was written."
                )
            )
            return
        with self._lock:
            if still_there := losses == self._losses:
                self._session, self._expected_shape = session, session.shape
                self._kept = None
        if still_there:
            self._show(session)
        else:
            self._refuse(
                Unavailable("vLLM went while its weights were mapped.", reason="ENGINE_LOST")
            )

    def _let_go(self) -> None:
        """Unmaps the memory of a lost engine; beside a new one's it would be held twice."""
        session = self._session
        if session is None or session.attachment.alive:
            return
        with self._lock:
            self._kept, self._session = session.keep() or self._kept, None
        del session
        # Modules and their parameters refer to each other in circles.
        gc.collect()

    def _refuse(self, error: ApolloError) -> None:
        log.error("not attached: %s (%s)", error.message, error.reason)
        gone = isinstance(error, Unavailable)
        if gone:
            with self._lock:
                self._found_epoch = ""
        self._board.update(
            attachment=status_pb2.ATTACHMENT_STATE_DETACHED
            if gone
            else status_pb2.ATTACHMENT_STATE_REFUSED,
            attachment_detail=f"{error.message} ({error.reason})",
        )

    def _show_map(self, report: MapReport) -> None:
        def change(status: status_pb2.ServerStatus) -> None:
            found = status.weight_map
            found.architecture = report.architecture
            found.parameters, found.views = report.parameters, report.views
            for name, reason in report.refused:
                found.refused.add(name=name, reason=reason)

        self._board.update(change)

    def _show(self, session: Session) -> None:
        memory = session.attachment.memory()

        def change(status: status_pb2.ServerStatus) -> None:
            status.attachment = status_pb2.ATTACHMENT_STATE_ATTACHED
            status.attachment_detail = "vLLM's live weights are mapped and verified."
            if session.other_weights:
                status.attachment_detail += f" Runs are refused: {session.other_weights}"
            status.model = session.attachment.directory
            status.engine_epoch = session.attachment.epoch
            status.weight_version = session.attachment.weight_version
            status.logprob_difference = session.attachment.logprob_difference
            status.weight_memory.parameters = memory.parameters
            status.weight_memory.shared_bytes = memory.shared_bytes
            status.weight_memory.copied_bytes = memory.copied_bytes
            session.show(status)

        self._board.update(change)

    # --- runs -------------------------------------------------------------------------------

    def submit(self, run: PreparedRun) -> EventLog:
        """Accepts a run; its log has the event `queued` already.

        Raises ResourceExhausted when the queue is full, FailedPrecondition when the optimizer
        state would be another than the run asks for, Unavailable when the server stops.
        """
        with self._lock:
            if self._stopping.is_set():
                raise Unavailable("The server is stopping.", reason="SERVER_STOPPING")
            waiting = len(self._waiting)
            if waiting >= self._settings.max_queued_runs:
                raise ResourceExhausted(
                    f"{waiting} runs are waiting, which is the limit; nothing was queued. "
                    "Try again when some have ended.",
                    reason="QUEUE_FULL",
                    metadata={"limit": str(self._settings.max_queued_runs)},
                )
            if self._session:
                self._session.require_accepted(run.options)
            if self._expected_shape:
                self._expected_shape = run.options.shape_on(self._expected_shape)
            events = EventLog(uuid.uuid4().hex, self._board.publish)
            self._waiting.append(events.run_id)
            events.append(queued=training_pb2.Queued(position=waiting + self._active))
            self._board.update(queue_length=waiting + 1)
            self._jobs.put(lambda: self._execute(run, events))
        return events

    def _execute(self, run: PreparedRun, events: EventLog) -> None:
        with self._lock:
            self._waiting.remove(events.run_id)
            self._active = 1
            self._board.update(active_run_id=events.run_id, queue_length=len(self._waiting))
        session = self._session
        if session is None:
            events.append(finished=_never_began(self._board.snapshot().attachment_detail))
        else:
            stopping = self._stopping
            Execution(session, self._sidecar, self._board, events, run, stopping).execute()
        with self._lock:
            self._active = 0
            if session and not self._waiting:
                # A run that failed before its reset leaves the shape as it was.
                self._expected_shape = session.shape
        self._board.update(active_run_id="")

    # --- checkpoints ------------------------------------------------------------------------

    def sync(self, progress: Progress) -> Future[tuple[SyncOutcome, int]]:
        """Syncs the model directory between two runs; the result holds the weight version too.

        Raises Unavailable when the server stops.
        """
        future: Future[tuple[SyncOutcome, int]] = Future()
        with self._lock:
            # After the thread's last job nobody would ever resolve it.
            if self._stopping.is_set():
                raise Unavailable("The server is stopping.", reason="SERVER_STOPPING")
            self._jobs.put(lambda: _resolve(future, lambda: self._sync(progress)))
        return future

    def _sync(self, progress: Progress) -> tuple[SyncOutcome, int]:
        attachment = self.session().attachment
        directory, reader = Path(attachment.directory), attachment.checkpoint()
        outcome = sync_directory(directory, reader, progress)
        version = self._board.snapshot().weight_version

        def change(status: status_pb2.ServerStatus) -> None:
            status.last_sync.time.CopyFrom(now())
            status.last_sync.weight_version = version
            status.last_sync.directory = attachment.directory

        self._board.update(change)
        return outcome, version

    # --- the end ----------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends the run at work after its step, saves the Apollo state, and joins the thread."""
        with self._lock:
            self._stopping.set()
            self._jobs.put(self._save_at_end)
            self._jobs.put(None)
        self._thread.join()

    def _save_at_end(self) -> None:
        session = self._session
        # The state of other weights must not be saved as that of these.
        if session is None or session.other_weights or not session.attachment.alive:
            return
        if session.optimizer.step_count:
            session.save()


def _never_began(detail: str) -> training_pb2.Finished:
    failure = training_pb2.Failure(
        reason="ENGINE_LOST", message=f"vLLM was gone when the run's turn came. {detail}"
    )
    return training_pb2.Finished(state=training_pb2.RUN_STATE_FAILED, failure=failure)


def _resolve(
    future: Future[tuple[SyncOutcome, int]], work: Callable[[], tuple[SyncOutcome, int]]
) -> None:
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
