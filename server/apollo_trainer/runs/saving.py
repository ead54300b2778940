"""What a run puts on disk by itself: the Apollo state, and automatic snapshots."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

from apollo_grpc.errors import FailedPrecondition, ResourceExhausted, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import Covered
from apollo_trainer.checkpoints.snapshots import SnapshotInfo
from apollo_trainer.engine import CapturedState, Saved, Session, StateSaver
from apollo_trainer.ledger import EventLog

log = logging.getLogger(__name__)


class RunSaves:
    """The saves and snapshots of one run. Training thread.

    Args:
        require_going: called while it waits; what it raises ends the run.
        warn: called with a reason and a message where something could not be kept.
    """

    def __init__(
        self,
        session: Session,
        saver: StateSaver,
        log: EventLog,
        steps_total: int,
        require_going: Callable[[], None],
        warn: Callable[[str, str], None],
    ):
        self._session, self._saver, self._log = session, saver, log
        self._steps_total, self._require_going, self._warn = steps_total, require_going, warn
        self._saved_at, self._skipping = time.monotonic(), False

    def begin(self) -> None:
        """Before the run's first write: saves a new state, and takes a snapshot to go back to.

        Raises FailedPrecondition with STATE_NOT_SAVED, and what `require_going` raises.
        """
        # A killed server would go on with the state on disk, which after a reset is another one.
        if not self._session.on_disk:
            self._require_saved()
        if self._session.settings.snapshot_before_runs:
            self._wait_for_snapshots()
            self._snapshot(0)

    def after_step(self, step: int) -> None:
        """Saves the state and takes a snapshot, each where it is due."""
        settings, session = self._session.settings, self._session
        steps = session.optimizer.step_count - session.captured_step
        is_due = bool(settings.save_steps) and steps >= settings.save_steps
        if settings.save_seconds:
            is_due |= time.monotonic() - self._saved_at >= settings.save_seconds
        if is_due and self._saver.idle:
            self._saved_at = time.monotonic()
            self._cover(step)
            self._saver.save(session.capture(running=True), self.tell)
        self._snapshot_while_running(step)

    def end(self, steps_done: int) -> CapturedState | None:
        """Copies the state at the run's end, to be saved.

        Returns None where the weights are gone: the state on disk stays that of before the run.
        """
        self._cover(steps_done)
        alive = self._session.attachment.alive
        return self._session.capture(running=False) if alive else None

    def tell(self, saved: Saved) -> None:
        """Adds the event of a save, or a warning where it failed. The saver's thread."""
        if saved.error:
            self._warn(
                "STATE_NOT_SAVED",
                f"The Apollo state could not be written ({saved.error}); the one on disk is an "
                "earlier one. Make room; it is written again at the end of the run or of the next.",
            )
            return
        self._log.append(
            state_saved=pb.RunEvent.StateSaved(
                optimizer_step=saved.optimizer_step, size_bytes=saved.size_bytes
            )
        )

    def _cover(self, steps_done: int) -> None:
        """Notes in the session what the state knows of this run, before it is saved."""
        self._session.covered = Covered(self._log.run_id, steps_done)

    def _require_saved(self) -> None:
        if error := self._session.save(self._saver, running=True):
            raise FailedPrecondition(
                f"The new Apollo state could not be written ({error}); nothing was trained. "
                "Make room in the server's state folder, then send the run again.",
                reason="STATE_NOT_SAVED",
            )

    def _snapshot_while_running(self, step: int) -> None:
        every = self._session.settings.snapshot_steps
        if every and step % every == 0 and step < self._steps_total:
            self._snapshot(step)

    def _wait_for_snapshots(self) -> None:
        """The snapshot before a run must not be skipped because another one is at work."""
        while at_work := self._session.checkpoints.snapshot_at_work:
            self._require_going()
            wait([at_work], timeout=0.1)

    def _snapshot(self, step: int) -> None:
        """Begins an automatic one, which training does not wait for."""
        session = self._session
        try:
            taken = session.checkpoints.snapshot(session.optimizer, session.extra())
        except ResourceExhausted:
            self._tell_skipped(step)
        except (OSError, Unavailable) as error:
            self._warn("SNAPSHOT_NOT_TAKEN", f"No snapshot can be taken here ({error}).")
        else:
            taken.add_done_callback(self._log_failure)
            self._skipping = False

    def _tell_skipped(self, step: int) -> None:
        """Once for all that are skipped in a row: one an event would double a run's events."""
        if not self._skipping:
            self._skipping = True
            self._warn(
                "SNAPSHOT_SKIPPED",
                f"After {step} steps no snapshot was taken: the one before is still being written, "
                "and until it is the next ones are skipped too. Take them at longer intervals "
                "(snapshot_steps), or on a faster disk.",
            )

    def _log_failure(self, taken: Future[SnapshotInfo]) -> None:
        # The run may have ended: a snapshot is no event of it then.
        if error := taken.exception():
            log.warning("run %s: a snapshot was not taken: %s", self._log.run_id, error)
