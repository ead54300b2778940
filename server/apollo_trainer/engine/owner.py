"""The one thread that owns the model: it attaches, trains, syncs and saves, one job at a time."""

from __future__ import annotations

import gc
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.generation import FIRST
from apollo_grpc.v1 import status_pb2
from apollo_trainer.checkpoints.directory import place_under, settle_directory
from apollo_trainer.config import Settings
from apollo_trainer.engine.open_session import open_session
from apollo_trainer.engine.session import KeptState, Session, weights_are_others
from apollo_trainer.engine.state_saver import StateSaver
from apollo_trainer.engine.status_board import StatusBoard
from apollo_trainer.optim.ahead import compile_ahead
from apollo_trainer.weights.attach import CHANGED_BY_OTHERS, Checks, MapReport, attach
from apollo_trainer.weights.fixed_values import told_derived
from apollo_trainer.weights.manifest import Refusal
from apollo_trainer.weights.sidecar import Sidecar

log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSED = "vLLM is paused by somebody else (POST /pause or /sleep) and is left so"


class ModelOwner:
    """Attaches, and does jobs in order; what touches weights or optimizer is done on its thread.

    Args:
        sidecar: of the engine to train.
        board: told every change.

    Attributes:
        saver: puts the Apollo state on disk.
        stopping: set once the server is to stop.
        attached: told of each new session, on the training thread, before anybody can use it.
    """

    def __init__(self, sidecar: Sidecar, board: StatusBoard, settings: Settings):
        self.sidecar, self._board, self._settings = sidecar, board, settings
        self.saver, self.stopping = StateSaver(), threading.Event()
        self.attached: Callable[[Session], None] = lambda session: None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._losses = 0
        self._session: Session | None = None
        self._kept: KeptState | None = None
        self._found_epoch, self._found_generation, self._attach_queued = "", FIRST, False
        self._probed_epoch = self._changed_epoch = ""
        self._compiling: threading.Thread | None = None
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
        if session and session.attachment.changed_by_others and not session.attachment.gone:
            raise Unavailable(CHANGED_BY_OTHERS, reason="ENGINE_NOT_ATTACHED")
        status = self._board.snapshot()
        if status.attachment == status_pb2.ATTACHMENT_STATE_REFUSED:
            raise FailedPrecondition(status.attachment_detail, reason="ATTACHMENT_REFUSED")
        raise Unavailable(
            f"{status.attachment_detail} Nothing was done.", reason="ENGINE_NOT_ATTACHED"
        )

    @property
    def live_session(self) -> Session | None:
        """The session now; it may have been lost, and is None before there ever was one."""
        return self._session

    def engine_found(self, epoch: str, generation: int = FIRST, paused: bool = False) -> None:
        """Attaches to an engine, unless it is attached, about to be, or was refused.

        Called at every beat: an attachment that failed because the engine was busy is tried again.

        Args:
            generation: another one may be attached where the one before was refused.
            paused: by somebody else; it scores nothing, which an attachment needs.
        """
        with self._lock:
            held = self._session.attachment if self._session else None
            lost = held is not None and not held.alive
            if held and held.not_live and held.epoch == epoch:
                # It answers, and would be attached again at every beat.
                return
            if self._attach_queued:
                return
            another = held is None and generation > self._found_generation
            new = lost or another or epoch != self._found_epoch
            if new and not paused:
                self._found_epoch, self._attach_queued = epoch, True
                # Before its manifest is read an engine tells of none.
                self._found_generation = max(generation, FIRST)
                self._jobs.put(lambda: self._attach(epoch))
                return
        if new:
            self._wait_for_resume(changed=held is not None and held.changed_by_others)
        else:
            self._show_paused(paused)

    def _wait_for_resume(self, *, changed: bool) -> None:
        why = f"{CHANGED_BY_OTHERS} " if changed else ""
        detail = f"{why}{PAUSED}; it is attached when they let it go on (POST /resume or /wake_up)."
        if self._board.snapshot().attachment_detail != detail:
            log.warning("%s", detail)
            self.engine_held(detail)

    def _show_paused(self, paused: bool) -> None:
        session, told = self._session, f"{PAUSED}; runs are taken all the same." if paused else ""
        if session and session.attachment.alive and session.paused != told:
            session.paused = told
            self._board.update(session.show)

    def engine_lost(self, detail: str) -> None:
        """From now on nothing is written; called from any thread, also in mid-run."""
        with self._lock:
            self._losses, self._found_epoch = self._losses + 1, ""
            session = self._session
        if session:
            session.attachment.lost.set()
        self._board.update(
            attachment=status_pb2.ATTACHMENT_STATE_DETACHED,
            attachment_detail=detail,
            optimizer_loaded=False,
        )
        # Its collection holds up every thread: before the lines above, the loss is told late.
        self._jobs.put(self._let_go)

    def engine_held(self, detail: str) -> None:
        """It is another training server's; it is asked for again and again. Any thread."""
        self._board.update(
            attachment=status_pb2.ATTACHMENT_STATE_DETACHED, attachment_detail=detail
        )

    def version_told(self, epoch: str, version: int) -> None:
        """What an engine says of its weights at every beat. Any thread."""

        def change(status: status_pb2.ServerStatus) -> None:
            if status.engine_epoch == epoch:
                status.weight_version = max(status.weight_version, version)

        self._board.update(change)

    def _attach(self, epoch: str) -> None:
        with self._lock:
            self._attach_queued, losses = False, self._losses
        if self.stopping.is_set():
            return
        self._let_go()
        self._board.update(
            lambda status: status.ClearField("weight_map"),
            attachment=status_pb2.ATTACHMENT_STATE_ATTACHING,
            attachment_detail="vLLM was found; its weights are being mapped and verified.",
        )
        try:
            model, states = Path(self.sidecar.manifest().model), self._settings.checkpoint_dir
            settle_directory(place_under(model, states))
            attachment = attach(
                self.sidecar, epoch, checks=self._checks(epoch), traced=self._show_map
            )
            self._probed_epoch = epoch
            self.saver.flush()
            session = open_session(attachment, self._settings, self._kept)
            self._doubt(session)
            self._look_ahead(session)
            self.attached(session)
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
                self._session, self._kept = session, None
        if still_there:
            self._show(session)
        else:
            self._refuse(
                Unavailable("vLLM went while its weights were mapped.", reason="ENGINE_LOST")
            )

    def _doubt(self, session: Session) -> None:
        """Of weights that others changed, no steps are counted that the state does not know of."""
        attachment = session.attachment
        others = attachment.found_generation > FIRST or attachment.epoch == self._changed_epoch
        if not (others and session.from_disk):
            return
        # Its digest of the weights was compared: either it is not of these, or it is not whole.
        if session.moved or session.captured_step < 0:
            session.other_weights = weights_are_others(session.optimizer.step_count)
        session.moved = session.from_disk = False

    def _checks(self, epoch: str) -> Checks:
        settings = self._settings
        return Checks(
            values=settings.check_values,
            all_values=settings.check_all_values,
            # An engine that was out of sight for a moment is not paused for it again.
            liveness=settings.probe_weights and epoch != self._probed_epoch,
            lease_seconds=settings.lease_seconds,
        )

    def _let_go(self) -> None:
        """Unmaps the memory of a lost engine; beside a new one's it would be held twice."""
        session = self._session
        if session is None or session.attachment.alive:
            return
        session.checkpoints.close()
        attachment = session.attachment
        if attachment.not_live or attachment.changed_by_others:
            self._probed_epoch = ""
        if attachment.changed_by_others:
            # The state in memory is of weights that are no more; that on disk knows its own.
            self._changed_epoch, kept = attachment.epoch, None
        else:
            kept = session.keep() or self._kept
        with self._lock:
            self._kept, self._session = kept, None
        del session, attachment
        # Modules and their parameters refer to each other in circles.
        gc.collect()

    def _refuse(self, error: ApolloError) -> None:
        log.error("not attached: %s (%s)", error.message, error.reason)
        if isinstance(error, Refusal) and error.tensors:
            self._show_refused(error.tensors)
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
            found.derived.extend(report.derived)

        self._board.update(change)

    def _show_refused(self, tensors: Mapping[str, str]) -> None:
        """All of them, where the message has a few: one a line, and for who asks for the status."""
        for name, reason in tensors.items():
            log.error("%s: %s", name, reason)

        def change(status: status_pb2.ServerStatus) -> None:
            for name, reason in tensors.items():
                status.weight_map.refused.add(name=name, reason=reason)

        self._board.update(change)

    def _show(self, session: Session) -> None:
        memory, warnings = session.attachment.memory(), [session.optimizer.slowness()]
        session.checkpoints.look()
        for warning in filter(None, [*warnings, session.checkpoints.not_synced]):
            log.warning("%s", warning)
        attachment = session.attachment
        derived = told_derived(attachment.derived)
        found = (attachment.plan.parts(), derived, str(attachment.liveness or ""))
        session.found = " ".join(filter(None, (*found, *warnings)))

        def change(status: status_pb2.ServerStatus) -> None:
            status.attachment = status_pb2.ATTACHMENT_STATE_ATTACHED
            status.model = session.attachment.directory
            status.engine_epoch = session.attachment.epoch
            status.weight_version = session.attachment.weight_version
            status.logprob_difference = session.attachment.logprob_difference
            status.weight_memory.parameters = memory.parameters
            status.weight_memory.shared_bytes = memory.shared_bytes
            status.weight_memory.copied_bytes = memory.copied_bytes
            session.show(status)

        self._board.update(change)

    def _look_ahead(self, session: Session) -> None:
        """Compiles what steps need; on a GPU before there is a run, which would wait for it."""
        self._compiling = threading.Thread(target=compile_ahead, args=[session.optimizer])
        self._compiling.start()
        if session.twin is not None:
            session.find_needs()
            session.compile_passes()
            self._compiling.join()

    # --- work between two runs --------------------------------------------------------------

    def between_runs(self, work: Callable[[], T], future: Future[T] | None = None) -> Future[T]:
        """Has the training thread do something once the run at work has ended.

        Args:
            future: what it comes to; one that was cancelled by then never begins.

        Raises Unavailable when the server stops, and so does the future of what had not begun.
        Any thread, event loops too.
        """
        future = Future() if future is None else future
        with self._lock:
            # After the thread's last job nobody would ever resolve it.
            if self.stopping.is_set():
                raise _stopping()
            self._jobs.put(lambda: _resolve(future, work, self.stopping))
        return future

    # --- the end ----------------------------------------------------------------------------

    def do(self, job: Callable[[], None]) -> None:
        """Has the training thread do something, after what waits already."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Ends the run at work after its step, saves the Apollo state, and joins the threads."""
        with self._lock:
            self.stopping.set()
            self._jobs.put(self._save_at_end)
            self._jobs.put(None)
        self._thread.join()
        if self._compiling:
            self._compiling.join()
        self.saver.stop()

    def _save_at_end(self) -> None:
        session = self._session
        if session:
            session.checkpoints.close()
        # The state of other weights must not be saved as that of these, nor that of mixed ones.
        if session is None or session.other_weights or session.checkpoints.poison.why:
            return
        if not session.attachment.alive:
            return
        self.saver.flush()
        if not session.is_saved() and (error := session.save(self.saver)):
            log.error("the Apollo state was not saved: %s", error)


def _stopping() -> Unavailable:
    return Unavailable(
        "The server is stopping; nothing was done. Ask again when it is started.",
        reason="SERVER_STOPPING",
    )


def _resolve(future: Future[T], work: Callable[[], T], stopped: threading.Event) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        if stopped.is_set():
            raise _stopping()
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
