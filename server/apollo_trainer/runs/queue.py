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
from apollo_grpc.times import now
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import Covered
from apollo_trainer.config import Settings
from apollo_trainer.engine import ModelOwner, Session, StatusBoard
from apollo_trainer.requests.options import read_options
from apollo_trainer.requests.samples import why_refused
from apollo_trainer.runs.events import EventLog, stopping
from apollo_trainer.runs.execution import Execution
from apollo_trainer.runs.journal import FOLDER
from apollo_trainer.runs.ledger import Acceptance, Ledger, RunRow, canonical, digest_of
from apollo_trainer.runs.ledger_file import LedgerFile
from apollo_trainer.runs.ledger_writer import LedgerWriter, Store
from apollo_trainer.runs.recovery import settle
from apollo_trainer.runs.retention import Retention
from apollo_trainer.runs.run import PreparedRun, prepare_run
from apollo_trainer.training.options import OptimizerOptions, StateShape
from apollo_trainer.weights.sidecar import Sidecar

log = logging.getLogger(__name__)
SECONDS_A_DAY = 86400
MIB = 2**20
TURN_AGAIN_SECONDS = 0.5


@dataclass
class QueuedRun:
    """A run from its acceptance to its end.

    Attributes:
        digest: of its spec, which is read from the ledger in the run's turn.
        size_bytes: of its spec.
        brought_back: by a restart; such a run waits for an engine, others fail without one.
        durable: its id, once it is on disk.
    """

    log: EventLog
    request_id: str
    digest: bytes
    options: OptimizerOptions
    size_bytes: int
    durable: Future[str]
    dry_run: bool = False
    brought_back: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


class RunQueue:
    """All runs of one server.

    But for `stop`, no method waits for a run or for the ledger to be written. Event loops call
    `log_of` alone: the others may read the disk.

    Args:
        owner: executes one run after the other.
        board: told every change, and every event.

    Raises FailedPrecondition when the ledger cannot be used.
    """

    def __init__(self, owner: ModelOwner, board: StatusBoard, settings: Settings):
        self._owner, self._board, self._settings = owner, board, settings
        # Event loops take the first one, which is held over names and order alone; who accepts a
        # run holds the second one, over the ledger's reading too.
        self._lock, self._accepting = threading.Lock(), threading.Lock()
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
        board.update(self._show_length)
        owner.attached = self._attached

    def _bring_back(self, row: RunRow) -> None:
        """A run that waited when the server ended; its samples become token ids in its turn."""
        spec = self.ledger.spec(row.run_id) or pb.RunSpec()
        entry = QueuedRun(
            self._new_log(row.run_id, row.last_sequence),
            row.request_id or "",
            row.digest,
            read_options(spec.optimizer),
            spec.ByteSize(),
            _known(row.run_id),
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
        session.refused_forms = _refused_forms(self._owner.sidecar)
        # Those that came behind one that was brought back had their turns without an engine too.
        with self._lock:
            waiting = len(self._waiting)
        for _ in range(waiting):
            self._owner.do(self._execute_next)

    # --- looking for runs -------------------------------------------------------------------

    def find(self, request_id: str, spec: pb.RunSpec) -> Future[str] | None:
        """The run that a request began, if it did: its id once it is on disk, or the refusal.

        Raises AlreadyExists when it began one of another spec. Any thread but an event loop's.
        """
        if not request_id:
            return None
        with self._lock:
            entry = next((r for r in self._runs.values() if r.request_id == request_id), None)
        row = None if entry else self.ledger.run_of_request(request_id)
        found = entry or row
        if found and found.digest != digest_of(canonical(spec)):
            raise AlreadyExists(
                "This request_id began a run of another spec; nothing was done. Send a new "
                "request_id, or none.",
                reason="REQUEST_ID_TAKEN",
            )
        if row:
            return _known(row.run_id)
        return entry.durable if entry else None

    def log_of(self, run_id: str) -> EventLog | None:
        """The log of a run that has not ended, or not wholly reached the disk. Any thread."""
        with self._lock:
            entry = self._runs.get(run_id)
        return entry.log if entry else None

    # --- taking runs ------------------------------------------------------------------------

    def submit(self, run: PreparedRun, spec: pb.RunSpec, request_id: str = "") -> Future[str]:
        """Accepts a run; its id comes once it is on disk, its event `queued` with it.

        Any thread but an event loop's.

        Nothing of its samples is kept in memory.

        Raises ResourceExhausted when the queue is full, FailedPrecondition when the optimizer
        state would be another than the run asks for, Unavailable when the server stops,
        AlreadyExists as `find` does. The future holds FailedPrecondition where the ledger cannot
        be written.
        """
        digest = digest_of(canonical(spec))
        with self._accepting:
            # A retry may be faster than the call that it repeats.
            if found := self.find(request_id, spec):
                return found
            self._require_room(run.options, spec.ByteSize())
            entry = self._enqueue(run, spec, request_id, digest)
        self._board.update(self._show_length)
        # Not before the locks are free: of a run that was refused already it is told here.
        entry.durable.add_done_callback(lambda _: self._accepted(entry))
        self._owner.do(self._execute_next)
        return entry.durable

    def _enqueue(
        self, run: PreparedRun, spec: pb.RunSpec, request_id: str, digest: bytes
    ) -> QueuedRun:
        run_id = uuid.uuid4().hex
        with self._lock:
            position = pb.Queued(position=len(self._waiting) + bool(self._active))
        queued = pb.RunEvent(run_id=run_id, sequence=1, event_time=now(), queued=position)
        run_log = self._new_log(run_id, sequence=0)
        run_log.begin_with(queued)
        durable = self._writer.accept(Acceptance(request_id, spec, run.steps_total, queued))
        size = spec.ByteSize()
        entry = QueuedRun(run_log, request_id, digest, run.options, size, durable, run.dry_run)
        with self._lock:
            self._runs[run_id] = entry
            self._waiting.append(entry)
        return entry

    def _accepted(self, entry: QueuedRun) -> None:
        """The run is on disk, or is not to be. On the ledger's thread, or the submitter's."""
        if entry.durable.exception() is None:
            entry.log.committed(1)
            return
        with self._lock:
            self._runs.pop(entry.log.run_id, None)
            if entry in self._waiting:
                self._waiting.remove(entry)
        self._board.update(self._show_length)

    def _show_length(self, status: status_pb2.ServerStatus) -> None:
        # Read when it is told: of two threads that tell it, the last one tells the newest.
        status.queue_length = len(self._waiting)

    def _forget(self, run_id: str) -> None:
        with self._lock:
            self._runs.pop(run_id, None)

    def _require_room(self, options: OptimizerOptions, size_bytes: int) -> None:
        if self._stopped:
            raise stopping()
        with self._lock:
            waiting = list(self._waiting)
        if len(waiting) >= self._settings.max_queued_runs:
            raise ResourceExhausted(
                f"{len(waiting)} runs are waiting, which is the limit; nothing was queued. "
                "Try again when some have ended.",
                reason="QUEUE_FULL",
                metadata={"limit": str(self._settings.max_queued_runs)},
            )
        held, limit = sum(r.size_bytes for r in waiting), self._settings.max_queued_mebibytes
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
        with self._lock:
            before = [self._active, *self._waiting]
        for entry in before:
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
        self._board.update(self._show_length, active_run_id=entry.log.run_id)
        try:
            # Its client has no answer before the disk has the run, nor has anybody its steps.
            if entry.durable.exception() is None:
                self._execute(entry, session)
        except Exception:
            log.exception("run %s was not executed", entry.log.run_id)
            _fail(entry, "INTERNAL", "The run failed by a mistake of the server's; see its log.")
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
            if entry.brought_back and isinstance(error, Unavailable) and session:
                self._put_back(entry, session)
            else:
                _fail(entry, error.reason, error.message)
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

    def _put_back(self, entry: QueuedRun, session: Session) -> None:
        """Its turn comes again: with the next engine, or as soon as this one answers."""
        with self._lock:
            self._waiting.appendleft(entry)
        if not session.attachment.lost.wait(TURN_AGAIN_SECONDS):
            self._owner.do(self._execute_next)

    def _prepare(self, entry: QueuedRun, session: Session) -> PreparedRun:
        spec = self.ledger.spec(entry.log.run_id) or pb.RunSpec()
        return prepare_run(spec, session.limits, self._owner.sidecar.tokenize)

    # --- the end ----------------------------------------------------------------------------

    def cancel(self, run_id: str) -> EventLog | None:
        """Asks a run to stop; returns the log of one that waited, and has ended by that.

        A run that has ended, or that there never was, is left alone. Any thread but an event
        loop's.
        """
        with self._lock:
            entry = self._runs.get(run_id)
            if entry is None:
                return None
            entry.cancelled.set()
            if entry not in self._waiting:
                return None
            self._waiting.remove(entry)
        self._board.update(self._show_length)
        entry.log.append(finished=pb.Finished(state=pb.RUN_STATE_CANCELLED))
        return entry.log

    def stop(self) -> None:
        """Ends the run at work after its step; those that wait are kept. Readers are let go.

        Any thread but an event loop's, and those of the server that it waits for.
        """
        with self._accepting, self._lock:
            self._stopped = True
        self._owner.stop()
        self._writer.stop()
        with self._lock:
            logs = [entry.log for entry in self._runs.values()]
        for run_log in logs:
            run_log.close()

    def close(self) -> None:
        """Ends reading, once nobody reads any more. Any thread."""
        self.ledger.close()


def _known(run_id: str) -> Future[str]:
    """Of a run that is on disk."""
    future: Future[str] = Future()
    future.set_running_or_notify_cancel()
    future.set_result(run_id)
    return future


def _fail(entry: QueuedRun, reason: str, message: str) -> None:
    failure = pb.Failure(reason=reason, message=message)
    entry.log.append(finished=pb.Finished(state=pb.RUN_STATE_FAILED, failure=failure))


def _refused_forms(sidecar: Sidecar) -> str:
    """Which forms of samples vLLM makes no tokens of, for the log and whoever asks."""
    try:
        found = why_refused(sidecar.tokenize)
    except ApolloError as error:
        # Each sample is asked about anyway.
        log.warning("it is not known whether vLLM makes tokens of samples: %s", error.message)
        return ""
    if found:
        log.warning("%s", found)
    else:
        log.info("vLLM makes the token ids of texts and chats as of its own prompts")
    return found


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
