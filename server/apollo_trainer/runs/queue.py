"""Runs: accepted once they are on disk, executed in order, found again by id and by request id."""

from __future__ import annotations

import logging
import threading
import uuid
from concurrent.futures import Future
from functools import partial

from apollo_grpc.errors import ApolloError, Unavailable
from apollo_grpc.times import now
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer import logs
from apollo_trainer.config import Settings
from apollo_trainer.engine import ModelOwner, Session, StatusBoard
from apollo_trainer.ledger import (
    FOLDER,
    Acceptance,
    EventLog,
    Retention,
    RunRow,
    digest_of,
    stopping,
)
from apollo_trainer.runs import way_back
from apollo_trainer.runs.admission import (
    MIB,
    begun,
    known,
    require_room,
    require_shape,
    require_version,
)
from apollo_trainer.runs.execution import Execution
from apollo_trainer.runs.needed_datasets import NeededDatasets
from apollo_trainer.runs.probing import regression_set_of
from apollo_trainer.runs.recovery import catch_up, open_ledger
from apollo_trainer.runs.regression_set import RegressionSet
from apollo_trainer.runs.run import PreparedRun, QueuedRun, prepare_run
from apollo_trainer.runs.run_spans import end_span
from apollo_trainer.training.options import OptimizerOptions

log = logging.getLogger(__name__)
SECONDS_A_DAY = 86400
TURN_AGAIN_SECONDS = 0.5


class RunQueue:
    """All runs of one server: accepted, executed in order on the owner's thread, looked up.

    Only `stop` waits for a run or for a write of the ledger. Event loops call `log_of` alone: the
    others may read the disk.

    Args:
        owner: executes one run after the other.
        board: shows every change, and every event.

    Raises FailedPrecondition when the ledger cannot be used.
    """

    def __init__(self, owner: ModelOwner, board: StatusBoard, settings: Settings):
        self._owner, self._board, self._settings = owner, board, settings
        # Event loops take the first one, which is held over names and order alone; who accepts a
        # run holds the second one, over the ledger's reading too.
        self._lock, self._accepting = threading.Lock(), threading.Lock()
        # In the order in which they were accepted, which is that of their turns.
        self._runs: dict[str, QueuedRun] = {}
        self._active: QueuedRun | None = None
        self._stopped = False
        keep = Retention(settings.ledger_days * SECONDS_A_DAY, settings.ledger_mebibytes * MIB)
        self.ledger, self.writer, waiting = open_ledger(settings.state_dir, keep)
        self.datasets = NeededDatasets(settings)
        for row in waiting:
            self._bring_back(row)
        board.update(self._show_length)
        board.observe(lambda event: end_span(event, self._runs))
        owner.attached = self._attached

    def _bring_back(self, row: RunRow) -> None:
        """Queues a run that waited when the server ended."""
        run_log = self._new_log(row.run_id, row.last_sequence)
        spec, durable = self.ledger.spec(row.run_id) or pb.RunSpec(), known(row.run_id)
        self._add(QueuedRun(run_log, row.request_id or "", row.digest, spec, durable, True))
        self.datasets.need_again(run_log, spec)

    def _add(self, entry: QueuedRun) -> QueuedRun:
        with self._lock:
            self._runs[entry.log.run_id] = entry
        return entry

    def _new_log(self, run_id: str, sequence: int = 0) -> EventLog:
        settled = partial(self._settle, run_id)
        return EventLog(run_id, self._board.publish, self.writer, sequence, settled)

    def _settle(self, run_id: str) -> None:
        self._forget(run_id)
        way_back.settle(self._settings.state_dir, run_id)

    def _forget(self, run_id: str) -> None:
        with self._lock:
            self._runs.pop(run_id, None)
        self.datasets.forget(run_id)

    def _waiting(self, *, active: bool = False) -> list[QueuedRun]:
        """Returns the runs that wait, in order; after the one at work where it is asked for."""
        with self._lock:
            before = self._active if active else None
            return [run for run in self._runs.values() if run.waits or run is before]

    def regression_set(self) -> RegressionSet:
        """Returns the probes that accepted runs left. Raises Unavailable without an engine."""
        return regression_set_of(self._owner.session())

    def _attached(self, session: Session) -> None:
        """Queues the turns of the runs that wait. On the training thread, with a new session."""
        if not way_back.finish(session, self._owner, self._board):
            catch_up(session, self.ledger)
        # Those that came behind one that was brought back had their turns without an engine too.
        for _ in self._waiting():
            self._owner.do(self._execute_next)

    # --- looking for runs -------------------------------------------------------------------

    def find(self, request_id: str, spec: pb.RunSpec) -> Future[str] | None:
        """Returns the future of the run that a request began; None where it began none.

        The future is that of `submit`. Raises AlreadyExists when the request began a run of
        another spec. Any thread but an event loop's.
        """
        if not request_id:
            return None
        with self._lock:
            entry = next((r for r in self._runs.values() if r.request_id == request_id), None)
        found = entry or self.ledger.run_of_request(request_id)
        return begun(found, spec) if found else None

    def log_of(self, run_id: str) -> EventLog | None:
        """Returns the log of a run until it has ended and is on disk; None then. Any thread."""
        with self._lock:
            entry = self._runs.get(run_id)
        return entry.log if entry else None

    # --- taking runs ------------------------------------------------------------------------

    def submit(self, run: PreparedRun, spec: pb.RunSpec, request_id: str = "") -> Future[str]:
        """Accepts a run; the future holds its id once it and its event `queued` are on disk.

        Raises ResourceExhausted when the queue is full, FailedPrecondition when the optimizer
        state would be another than the run asks for, Unavailable when the server stops,
        AlreadyExists as `find` does, Aborted where the weights are newer than the spec expects.
        The future holds FailedPrecondition where the ledger cannot be written. Any thread but an
        event loop's.
        """
        digest = digest_of(spec)
        with self._accepting:
            # A retry may be faster than the call that it repeats.
            if found := self.find(request_id, spec):
                return found
            self.require_admitted(run.options, spec)
            entry = self._enqueue(run, spec, request_id, digest)
        self._board.update(self._show_length)
        # Not before the locks are free: a run that was refused already is taken out here.
        entry.durable.add_done_callback(lambda _: self._accepted(entry))
        self._owner.do(self._execute_next)
        return entry.durable

    def _enqueue(
        self, run: PreparedRun, spec: pb.RunSpec, request_id: str, digest: bytes
    ) -> QueuedRun:
        run_id = uuid.uuid4().hex
        run_log = self._new_log(run_id)
        self.datasets.need(run_log, spec)
        position = pb.RunEvent.Queued(position=len(self._waiting(active=True)))
        queued = pb.RunEvent(run_id=run_id, sequence=1, event_time=now(), queued=position)
        run_log.begin_with(queued)
        durable = self.writer.change(Acceptance(request_id, spec, run.steps_total, queued))
        return self._add(QueuedRun(run_log, request_id, digest, spec, durable))

    def _accepted(self, entry: QueuedRun) -> None:
        """Shows a run that is on disk; takes out one that was refused.

        On the ledger's thread, or the submitter's.
        """
        if entry.durable.exception() is None:
            entry.log.committed(1)
            return
        entry.span.end(failed=True)
        self._forget(entry.log.run_id)
        self._board.update(self._show_length)

    def _show_length(self, status: status_pb2.ServerStatus) -> None:
        # Read when it is told: of two threads that tell it, the last one tells the newest.
        status.queue_length = len(self._waiting())

    def require_admitted(self, options: OptimizerOptions, spec: pb.RunSpec) -> None:
        """Raises as `submit` does, where such a run would not be taken at this moment."""
        if self._stopped:
            raise stopping()
        require_room(self._waiting(), spec.ByteSize(), self._settings)
        session = self._owner.session()
        require_version(session.weight_version, spec, may_rise=True)
        session.require_accepted(options)
        require_shape(session.shape, self._waiting(active=True), options)

    # --- executing --------------------------------------------------------------------------

    def _execute_next(self) -> None:
        """Executes the run that has waited longest, if any waits. Training thread."""
        session = self._owner.live_session
        with self._lock:
            entry = next((run for run in self._runs.values() if run.waits), None)
            if self._stopped or entry is None or (entry.brought_back and session is None):
                return
            entry.waits, self._active = False, entry
        self._board.update(self._show_length, active_run_id=entry.log.run_id)
        try:
            # Its client has no answer before the disk has the run, nor has anybody its steps.
            if entry.durable.exception() is None:
                with logs.about(run_id=entry.log.run_id), entry.span.current():
                    self._execute(entry, session)
        except Exception:
            about = {"run_id": entry.log.run_id}
            log.exception("run %s was not executed", entry.log.run_id, extra=about)
            entry.fail("INTERNAL", "The run failed by a mistake of the server's; see its log.")
        finally:
            self._active = None
            self._board.update(active_run_id="")

    def _execute(self, entry: QueuedRun, session: Session | None) -> None:
        try:
            if session is None:
                detail = self._board.snapshot().attachment_detail
                raise Unavailable(
                    f"vLLM was gone when the run's turn came. {detail}", reason="ENGINE_LOST"
                )
            spec = self.ledger.spec(entry.log.run_id) or pb.RunSpec()
            require_version(session.weight_version, spec)
            tokenize, datasets = self._owner.sidecar.tokenize, self.datasets.store
            run = prepare_run(spec, session.limits, tokenize, datasets)
        except ApolloError as error:
            if entry.brought_back and isinstance(error, Unavailable) and session:
                self._put_back(entry, session)
            else:
                entry.fail(error.reason, error.message)
            return
        entry.log.open_journal(self._settings.state_dir / FOLDER)
        Execution(session, self._owner, self._board, entry.log, run, entry.cancelled).execute()

    def _put_back(self, entry: QueuedRun, session: Session) -> None:
        """Gives it another turn: with the next engine, or as soon as this one answers."""
        entry.waits = True
        if not session.attachment.lost.wait(TURN_AGAIN_SECONDS):
            self._owner.do(self._execute_next)

    # --- the end ----------------------------------------------------------------------------

    def cancel(self, run_id: str) -> EventLog | None:
        """Asks a run to stop. Returns the log of one that waited, which has ended by that.

        Does nothing for a run that has ended or never was. Any thread but an event loop's.
        """
        with self._lock:
            entry = self._runs.get(run_id)
            if entry is None:
                return None
            entry.cancelled.set()
            if not entry.waits:
                return None
            entry.waits = False
        self._board.update(self._show_length)
        entry.log.append(finished=pb.RunEvent.Finished(state=pb.RUN_STATE_CANCELLED))
        return entry.log

    def stop(self) -> None:
        """Ends the run at work after its step, and every reader; runs that wait are kept.

        Any thread but an event loop's, and those of the server that it waits for.
        """
        with self._accepting, self._lock:
            self._stopped = True
        self._owner.stop()
        self.writer.stop()
        with self._lock:
            logs = [entry.log for entry in self._runs.values()]
        for run_log in logs:
            run_log.close()

    def close(self) -> None:
        """Closes the ledger, once nobody reads it any more. Any thread."""
        self.ledger.close()
