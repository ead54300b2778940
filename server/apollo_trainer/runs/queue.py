"""Runs: accepted once they are on disk, executed in order, found again by id and by request id."""

from __future__ import annotations

import logging
import sqlite3
import threading
import uuid
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from apollo_grpc.errors import (
    AlreadyExists,
    ApolloError,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
)
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state_header import Covered
from apollo_trainer.config import Settings
from apollo_trainer.runs.events import EventLog, now, stopping
from apollo_trainer.runs.execution import Execution
from apollo_trainer.runs.journal import FOLDER
from apollo_trainer.runs.ledger import Acceptance, Ledger, RunRow, canonical, digest_of
from apollo_trainer.runs.ledger_file import LedgerFile
from apollo_trainer.runs.ledger_writer import LedgerWriter, Store
from apollo_trainer.runs.owner import ModelOwner
from apollo_trainer.runs.recovery import settle
from apollo_trainer.runs.retention import Retention
from apollo_trainer.runs.run import PreparedRun, prepare_run
from apollo_trainer.runs.session import Session
from apollo_trainer.runs.status_board import StatusBoard
from apollo_trainer.training.options import OptimizerOptions, StateShape, read_options

log = logging.getLogger(__name__)
SECONDS_A_DAY = 86400
MIB = 2**20


@dataclass
class QueuedRun:
    """A run from its acceptance to its end.

    Attributes:
        digest: of its spec, which is read from the ledger in the run's turn.
        size_bytes: of its spec.
        brought_back: by a restart; such a run waits for an engine, others fail without one.
        durable: resolved once it is on disk.
    """

    log: EventLog
    request_id: str
    digest: bytes
    options: OptimizerOptions
    size_bytes: int
    durable: Future[None]
    dry_run: bool = False
    brought_back: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


class RunQueue:
    """All runs of one server. Every method may be called from any thread.

    Args:
        owner: executes one run after the other.
        board: told every change, and every event.

    Raises FailedPrecondition when the ledger cannot be used.
    """

    def __init__(self, owner: ModelOwner, board: StatusBoard, settings: Settings):
        self._owner, self._board, self._settings = owner, board, settings
        self._lock = threading.Lock()
        self._waiting: deque[QueuedRun] = deque()
        self._active: QueuedRun | None = None
        self._runs: dict[str, QueuedRun] = {}
        self._stopped = False
        file = LedgerFile(settings.state_dir)
        self.ledger = Ledger(file)
        waiting = _settle(file, self.ledger, settings.state_dir)
        keep = Retention(settings.ledger_days * SECONDS_A_DAY, settings.ledger_mebibytes * MIB)
        self._writer = LedgerWriter(file, keep)
        for row in waiting:
            self._bring_back(row)
        board.update(queue_length=len(self._waiting))
        owner.attached = self._attached

    def _bring_back(self, row: RunRow) -> None:
        """A run that waited when the server ended; its samples become token ids in its turn."""
        spec, durable = self.ledger.spec(row.run_id) or pb.RunSpec(), Future[None]()
        durable.set_result(None)
        entry = QueuedRun(
            self._new_log(row.run_id, row.last_sequence),
            row.request_id or "",
            row.digest,
            read_options(spec.optimizer),
            spec.ByteSize(),
            durable,
            spec.dry_run,
            brought_back=True,
        )
        self._runs[row.run_id] = entry
        self._waiting.append(entry)

    def _new_log(self, run_id: str, sequence: int) -> EventLog:
        store = Store(self.ledger, self._writer)
        settled = partial(self._forget, run_id)
        return EventLog(run_id, self._board.publish, store, sequence, settled)

    def _attached(self, session: Session) -> None:
        """On the training thread, once an engine is there."""
        _catch_up(session, self.ledger)
        with self._lock:
            for entry in self._waiting:
                if entry.brought_back:
                    self._owner.do(self._execute_next)

    # --- looking for runs -------------------------------------------------------------------

    def find(self, request_id: str, spec: pb.RunSpec) -> str | None:
        """The id of the run that a request began, if it did.

        Raises AlreadyExists when it began one of another spec, or the error for which the run was
        not taken.
        """
        if not request_id:
            return None
        with self._lock:
            entry = next((r for r in self._runs.values() if r.request_id == request_id), None)
        row = None if entry else self.ledger.run_of_request(request_id)
        found = entry or row
        if found is None:
            return None
        if found.digest != digest_of(canonical(spec)):
            raise AlreadyExists(
                "This request_id began a run of another spec; nothing was done. Send a new "
                "request_id, or none.",
                reason="REQUEST_ID_TAKEN",
            )
        if entry:
            entry.durable.result()
            return entry.log.run_id
        return row.run_id if row else None

    def log_of(self, run_id: str) -> EventLog | None:
        """The log of a run that has not ended, or not wholly reached the disk."""
        with self._lock:
            entry = self._runs.get(run_id)
        return entry.log if entry else None

    # --- taking runs ------------------------------------------------------------------------

    def submit(self, run: PreparedRun, spec: pb.RunSpec, request_id: str = "") -> str:
        """Accepts a run and returns its id once it is on disk, its event `queued` with it.

        Nothing of its samples is kept in memory.

        Raises ResourceExhausted when the queue is full, FailedPrecondition when the optimizer
        state would be another than the run asks for or the ledger cannot be written, Unavailable
        when the server stops, AlreadyExists as `find` does.
        """
        run_id = uuid.uuid4().hex
        with self._lock:
            taken = bool(request_id) and self._is_taken(request_id)
            if not taken:
                self._require_room(run.options, spec.ByteSize())
                entry = self._enqueue(run_id, run, spec, request_id)
        if taken:
            # By a retry that was faster than the call that it repeats.
            return self.find(request_id, spec) or ""
        entry.durable.result()
        return run_id

    def _is_taken(self, request_id: str) -> bool:
        here = any(entry.request_id == request_id for entry in self._runs.values())
        return here or self.ledger.run_of_request(request_id) is not None

    def _enqueue(
        self, run_id: str, run: PreparedRun, spec: pb.RunSpec, request_id: str
    ) -> QueuedRun:
        position = pb.Queued(position=len(self._waiting) + bool(self._active))
        queued = pb.RunEvent(run_id=run_id, sequence=1, event_time=now(), queued=position)
        run_log = self._new_log(run_id, sequence=0)
        run_log.begin_with(queued)
        durable = self._writer.accept(Acceptance(request_id, spec, run.steps_total, queued))
        digest, size = digest_of(canonical(spec)), spec.ByteSize()
        entry = QueuedRun(run_log, request_id, digest, run.options, size, durable, run.dry_run)
        self._runs[run_id] = entry
        self._waiting.append(entry)
        self._show_length()
        durable.add_done_callback(lambda _: self._accepted(entry))
        self._owner.do(self._execute_next)
        return entry

    def _accepted(self, entry: QueuedRun) -> None:
        """The run is on disk, or is not to be."""
        if entry.durable.exception() is None:
            entry.log.committed(1)
            return
        with self._lock:
            self._runs.pop(entry.log.run_id, None)
            if entry in self._waiting:
                self._waiting.remove(entry)
            self._show_length()

    def _show_length(self) -> None:
        self._board.update(queue_length=len(self._waiting))

    def _forget(self, run_id: str) -> None:
        with self._lock:
            self._runs.pop(run_id, None)

    def _require_room(self, options: OptimizerOptions, size_bytes: int) -> None:
        if self._stopped:
            raise stopping()
        waiting = len(self._waiting)
        if waiting >= self._settings.max_queued_runs:
            raise ResourceExhausted(
                f"{waiting} runs are waiting, which is the limit; nothing was queued. "
                "Try again when some have ended.",
                reason="QUEUE_FULL",
                metadata={"limit": str(self._settings.max_queued_runs)},
            )
        held, limit = sum(r.size_bytes for r in self._waiting), self._settings.max_queued_mebibytes
        if held and held + size_bytes > limit * MIB:
            raise ResourceExhausted(
                f"The runs that wait have {held} bytes of samples, this one {size_bytes}: together "
                f"more than the limit of {limit} MiB; nothing was queued. Try again when some have "
                "ended.",
                reason="QUEUE_FULL",
                metadata={"limit_mebibytes": str(limit)},
            )
        session = self._owner.session()
        session.require_accepted(options)
        options.shape_on(self._shape_after(session.shape))

    def _shape_after(self, shape: StateShape) -> StateShape:
        """What the optimizer's state is like once every run before has begun."""
        for entry in (self._active, *self._waiting):
            if entry and entry.options.reset and not entry.dry_run:
                shape = entry.options.shape_on(shape)
        return shape

    # --- executing --------------------------------------------------------------------------

    def _execute_next(self) -> None:
        """On the training thread: the run that has waited longest, if any waits."""
        session = self._owner.live_session
        with self._lock:
            if self._stopped or not self._waiting:
                return
            entry = self._waiting[0]
            if session is None and entry.brought_back:
                return
            self._waiting.popleft()
            self._active = entry
            self._board.update(active_run_id=entry.log.run_id, queue_length=len(self._waiting))
        try:
            # Its client has no answer before the disk has the run, nor has anybody its steps.
            if entry.durable.exception() is None:
                self._execute(entry, session)
        finally:
            with self._lock:
                self._active = None
            self._board.update(active_run_id="")

    def _execute(self, entry: QueuedRun, session: Session | None) -> None:
        try:
            if session is None:
                detail = self._board.snapshot().attachment_detail
                raise Unavailable(
                    f"vLLM was gone when the run's turn came. {detail}", reason="ENGINE_LOST"
                )
            run = self._prepare(entry, session)
        except ApolloError as error:
            failure = pb.Failure(reason=error.reason, message=error.message)
            entry.log.append(finished=pb.Finished(state=pb.RUN_STATE_FAILED, failure=failure))
            return
        entry.log.open_journal(self._settings.state_dir / FOLDER)
        owner = self._owner
        Execution(
            session,
            owner.sidecar,
            self._board,
            entry.log,
            run,
            owner.saver,
            owner.stopping,
            entry.cancelled,
        ).execute()

    def _prepare(self, entry: QueuedRun, session: Session) -> PreparedRun:
        spec = self.ledger.spec(entry.log.run_id) or pb.RunSpec()
        return prepare_run(spec, session.limits, session.tokenizer)

    # --- the end ----------------------------------------------------------------------------

    def cancel(self, run_id: str) -> EventLog | None:
        """Asks a run to stop; returns the log of one that waited, and has ended by that.

        A run that has ended, or that there never was, is left alone.
        """
        with self._lock:
            entry = self._runs.get(run_id)
            if entry is None:
                return None
            entry.cancelled.set()
            if entry not in self._waiting:
                return None
            self._waiting.remove(entry)
            self._show_length()
        entry.log.append(finished=pb.Finished(state=pb.RUN_STATE_CANCELLED))
        return entry.log

    def stop(self) -> None:
        """Ends the run at work after its step; those that wait are kept. Readers are let go."""
        with self._lock:
            self._stopped = True
        self._owner.stop()
        self._writer.stop()
        with self._lock:
            logs = [entry.log for entry in self._runs.values()]
        for run_log in logs:
            run_log.close()

    def close(self) -> None:
        """Ends reading, once nobody reads any more."""
        self.ledger.close()


def _settle(file: LedgerFile, ledger: Ledger, state_dir: Path) -> list[RunRow]:
    try:
        return settle(file, ledger, state_dir)
    except (sqlite3.Error, OSError) as error:
        ledger.close()
        file.close()
        raise FailedPrecondition(
            f"The runs of an earlier server cannot be settled ({error}); the ledger and the "
            "journals are as they were, and no run is taken. Make room in the state folder, then "
            "start again.",
            reason="LEDGER_NOT_WRITTEN",
        ) from error


def _catch_up(session: Session, ledger: Ledger) -> None:
    """Counts the steps that a killed server wrote after the last save of the Apollo state.

    Weights that neither the state nor those steps explain are taken for others.
    """
    row = ledger.latest_on(session.attachment.epoch)
    if session.came_back:
        # Its state in memory has seen every step, and the ledger may not have them yet.
        return
    if session.from_disk and not session.other_weights:
        steps, in_doubt = _steps_since(session, row, ledger)
        session.catch_up(steps, in_doubt=in_doubt)
    session.covered = Covered(row.run_id, row.steps_done) if row else Covered()


def _steps_since(session: Session, row: RunRow | None, ledger: Ledger) -> tuple[int, bool]:
    """Steps that the state has not seen, and whether one more may be in the weights in part."""
    if row is None:
        return 0, False
    if row.run_id == session.covered.run_id:
        steps = row.steps_done - session.covered.steps
    else:
        steps = row.optimizer_step + row.steps_done - session.optimizer.step_count
    last = ledger.events(row.run_id, row.last_sequence - 1, 1)
    return max(0, steps), any(event.finished.next_step_in_doubt for event in last)
