"""The owner of the model: it attaches to engines, and gives each a session."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.generation import FIRST
from apollo_grpc.v1 import status_pb2
from apollo_trainer.checkpoints.directory import place_under, settle_directory
from apollo_trainer.config import Settings
from apollo_trainer.engine.open_session import (
    checks_of,
    doubt,
    gone,
    look_ahead,
    mistake,
    open_session,
    prepare,
    refused_forms,
)
from apollo_trainer.engine.other_ranks import OtherRanks
from apollo_trainer.engine.server_info import model_info
from apollo_trainer.engine.session import KeptState, Session
from apollo_trainer.engine.state_saver import StateSaver
from apollo_trainer.engine.status_board import StatusBoard
from apollo_trainer.engine.training_thread import TrainingThread
from apollo_trainer.optim.ahead import compile_ahead
from apollo_trainer.weights.attach import attach
from apollo_trainer.weights.attachment import CHANGED_BY_OTHERS
from apollo_trainer.weights.fixed_values import told_derived
from apollo_trainer.weights.manifest import Refusal
from apollo_trainer.weights.sidecar import Sidecar

log = logging.getLogger(__name__)
PAUSED = "vLLM is paused by somebody else (POST /pause or /sleep) and is left so"


class ModelOwner(TrainingThread):
    """Attaches to engines on the training thread, where all that touches the model is done.

    Args:
        sidecar: of the engine to train.
        board: shows every change.

    Attributes:
        saver: puts the Apollo state on disk.
        attached: called with each new session, on the training thread, before anybody can use it.
    """

    def __init__(self, sidecar: Sidecar, board: StatusBoard, settings: Settings):
        super().__init__()
        self.sidecar, self._board, self._settings = sidecar, board, settings
        self.saver = StateSaver()
        self.attached: Callable[[Session], None] = lambda session: None
        self._losses = 0
        self._session: Session | None = None
        self._kept: KeptState | None = None
        self._found_epoch, self._found_generation, self._attach_queued = "", FIRST, False
        self._probed_epoch = self._changed_epoch = ""
        self._compiling: threading.Thread | None = None
        self._others = OtherRanks(settings, self._rank_ended)

    def session(self) -> Session:
        """Returns the live session. Any thread.

        Raises Unavailable without one, FailedPrecondition when the attachment was refused.
        """
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
        """The session, whose engine may be lost already; None where there is none. Any thread."""
        return self._session

    def engine_found(self, epoch: str, generation: int = FIRST, paused: bool = False) -> None:
        """Attaches to an engine, unless it is attached, about to be, or was refused.

        Called at every beat: an attachment that failed because the engine was busy is tried again.

        Args:
            generation: a new one is tried where the one before was refused.
            paused: by somebody else; such an engine scores nothing, which an attachment needs.
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
                self.do(lambda: self._attach(epoch))
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
            self._board.show(session)

    def engine_lost(self, detail: str) -> None:
        """Forbids all writes from now on. Any thread, also in mid-run."""
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
        self.do(self._let_go)

    def _rank_ended(self, detail: str) -> None:
        """A trainer rank is gone: the engine is attached anew. Any thread."""
        log.error("%s", detail)
        if session := self._session:
            session.attachment.rank_ended = detail
        self.engine_lost(f"{detail} vLLM is attached again by itself.")

    def engine_held(self, detail: str) -> None:
        """Shows why an engine is not attached yet; the watch asks for it again. Any thread."""
        self._board.update(
            attachment=status_pb2.ATTACHMENT_STATE_DETACHED, attachment_detail=detail
        )

    def engine_told(
        self, epoch: str, version: int, iterations: Iterable[tuple[float, float]]
    ) -> None:
        """Takes what an engine tells at every beat: its weight version, and how tokens came.

        Args:
            iterations: those since the last beat, as `Pace.tokens` takes them.

        Any thread.
        """
        session = self._session
        if session and session.attachment.epoch == epoch:
            session.pace.tokens(iterations)
            session.count_version(version)
            self._board.show_version(session)

    def _attach(self, epoch: str) -> None:
        with self._lock:
            self._attach_queued, losses = False, self._losses
        if self.stopping.is_set():
            return
        self._let_go()
        self._others.end()
        self._board.update(
            lambda status: status.ClearField("weight_map"),
            attachment=status_pb2.ATTACHMENT_STATE_ATTACHING,
            attachment_detail="vLLM was found; its weights are being mapped and verified.",
        )
        try:
            # An engine that was out of sight for a moment is not paused for a probe again.
            checks = checks_of(self._settings, probed=epoch == self._probed_epoch)
            manifest, states = self.sidecar.manifest(), self._settings.checkpoint_dir
            settle_directory(place_under(Path(manifest.model), states))
            attachment = attach(
                self.sidecar,
                epoch,
                checks=checks,
                ranks=self._others.begin(epoch, manifest, checks),
                traced=self._board.show_map,
                prepare=prepare,
            )
            self._probed_epoch = epoch
            self.saver.flush()
            session = open_session(attachment, self._settings, self._kept, self._others)
            if attachment.found_generation > FIRST or epoch == self._changed_epoch:
                doubt(session)
            self._compiling = threading.Thread(target=compile_ahead, args=[session.optimizer])
            self._compiling.start()
            look_ahead(session, self._compiling)
            session.refused_forms = refused_forms(self.sidecar)
            session.model_info = model_info(session)
            self.attached(session)
        except ApolloError as error:
            self._refuse(error)
            return
        except Exception as error:
            log.exception("the attachment failed")
            self._refuse(mistake(error) if losses == self._losses else gone())
            return
        with self._lock:
            if still_there := losses == self._losses:
                self._session, self._kept = session, None
        if still_there:
            self._show(session)
        else:
            self._refuse(gone())

    def _let_go(self) -> None:
        """Unmaps the memory of a lost engine, which a new one's would be held beside."""
        session = self._session
        if session is None or session.attachment.alive:
            return
        session.checkpoints.close()
        self._others.end()
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
        if isinstance(error, Refusal):
            # All of them, where the message has a few.
            for name, reason in error.tensors.items():
                log.error("%s: %s", name, reason)
            self._board.show_refused(error.tensors)
        is_gone = isinstance(error, Unavailable)
        if is_gone:
            with self._lock:
                self._found_epoch = ""
        self._board.update(
            attachment=status_pb2.ATTACHMENT_STATE_DETACHED
            if is_gone
            else status_pb2.ATTACHMENT_STATE_REFUSED,
            attachment_detail=f"{error.message} ({error.reason})",
        )

    def _show(self, session: Session) -> None:
        attachment, slow = session.attachment, session.optimizer.slowness()
        session.checkpoints.look()
        for warning in filter(None, (slow, session.checkpoints.not_synced)):
            log.warning("%s", warning)
        derived, live = told_derived(attachment.derived), attachment.told_liveness()
        session.found = " ".join(filter(None, (attachment.plan.parts(), derived, live, slow)))
        self._board.show_attached(session)

    def stop(self) -> None:
        """Ends the run at work after its step, saves the Apollo state, and joins the threads."""
        self.end(self._save_at_end)
        self._others.end()
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
