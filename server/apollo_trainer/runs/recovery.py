"""Opens the ledger, and settles what a crash left: interrupted runs, and the steps they wrote.

What a killed server had not put into the ledger is in the run's journal. Queued runs are kept; one
that was at work ends as FAILED, with the steps that are in the weights.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.times import now
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import Covered, saved_steps
from apollo_trainer.ledger import (
    FOLDER,
    JournalContents,
    Ledger,
    LedgerFile,
    LedgerWriter,
    Retention,
    RunRow,
    end_interrupted,
    journals_in,
    read_journal,
    remove_journal,
    transaction,
    write_events,
)
from apollo_trainer.runs.way_back import ends_in

if TYPE_CHECKING:
    from apollo_trainer.engine import Session

log = logging.getLogger(__name__)


def open_ledger(state_dir: Path, retention: Retention) -> tuple[Ledger, LedgerWriter, list[RunRow]]:
    """Opens the ledger, and ends the runs and the operations that a crash interrupted.

    Returns it for reading and for writing, and the runs that wait, in order. Raises
    FailedPrecondition as `LedgerFile`, and where the disk refuses; nothing is lost by trying again.
    """
    file = LedgerFile(state_dir)
    ledger = Ledger(file)
    try:
        waiting = _settle(file.writer, ledger, state_dir)
        end_interrupted(file.writer)
    except (sqlite3.Error, OSError) as error:
        ledger.close()
        file.close()
        raise FailedPrecondition(
            f"The runs of an earlier server cannot be settled ({error}); the ledger and the "
            "journals are as they were, and no run is taken. Make room in the state folder, then "
            "start again.",
            reason="LEDGER_NOT_WRITTEN",
        ) from error
    return ledger, LedgerWriter(file, ledger, retention), waiting


def _settle(connection: sqlite3.Connection, ledger: Ledger, state_dir: Path) -> list[RunRow]:
    folder = state_dir / FOLDER
    journals = {run_id: read_journal(folder, run_id) for run_id in journals_in(folder)}
    missing = [event for j in journals.values() for event in _missing(ledger, j.events)]
    with transaction(connection):
        write_events(connection, missing)
    ends = ends_in(state_dir)
    for row in ledger.unfinished():
        if row.state != pb.RUN_STATE_RUNNING:
            continue
        journal = journals.get(row.run_id, JournalContents())
        finished = ends.get(row.run_id) or _interrupted(
            row, journal, saved_steps(state_dir, row.epoch)
        )
        log.warning("run %s: %s", row.run_id, finished.failure.message)
        event = pb.RunEvent(
            run_id=row.run_id,
            sequence=row.last_sequence + 1,
            event_time=now(),
            finished=finished,
        )
        with transaction(connection):
            write_events(connection, [event])
    for run_id in journals:
        remove_journal(folder, run_id)
    return ledger.unfinished()


def _missing(ledger: Ledger, events: list[pb.RunEvent]) -> list[pb.RunEvent]:
    """Returns the events that follow those in the ledger, without a gap."""
    row = ledger.run(events[0].run_id) if events else None
    missing: list[pb.RunEvent] = []
    if row is None or row.has_ended:
        return missing
    for event in events:
        if event.sequence == row.last_sequence + len(missing) + 1:
            missing.append(event)
    return missing


def _interrupted(row: RunRow, journal: JournalContents, saved: int | None) -> pb.RunEvent.Finished:
    steps = [event.step for event in journal.events if event.HasField("step")]
    done = max([row.steps_done, *(step.step for step in steps if not step.dry_run)])
    in_doubt = journal.begun > done
    reached = row.optimizer_step + done
    lost = min(done, max(0, reached - (saved or 0)))
    message = (
        f"The training server ended during this run. {done} of {row.steps_total} steps are in "
    )
    message += "the weights" + (", and one more may be, wholly or in part. " if in_doubt else ". ")
    message += (
        f"The Apollo state on disk lacks the last {lost} of them: their moments are lost. "
        if lost
        else "The Apollo state on disk has all of them. "
    )
    message += "Send what is left as a new run; if vLLM ended, too, the steps since the last sync "
    message += "are gone with it."
    return pb.RunEvent.Finished(
        state=pb.RUN_STATE_FAILED,
        failure=pb.Notice(reason="INTERRUPTED", message=message),
        steps_done=done,
        next_step_in_doubt=in_doubt,
        state_steps_lost=lost,
    )


def catch_up(session: Session, ledger: Ledger) -> None:
    """Counts the steps that a killed server wrote after the last save of the Apollo state.

    Weights that neither the state nor those steps explain are taken for others. Training thread.
    """
    row = ledger.latest_on(session.attachment.epoch)
    if session.came_back:
        # Its state in memory has seen every step, and the ledger may not have them yet.
        return
    if session.from_disk and not session.other_weights:
        steps, in_doubt = _steps_since(session, row)
        session.catch_up(steps, in_doubt=in_doubt)
    session.covered = Covered(row.run_id, row.steps_done) if row else Covered()


def _steps_since(session: Session, row: RunRow | None) -> tuple[int, bool]:
    """Steps that the state has not seen, and whether one more may be in the weights in part."""
    if row is None:
        return 0, False
    if row.run_id == session.covered.run_id:
        steps = row.steps_done - session.covered.steps
    else:
        steps = row.optimizer_step + row.steps_done - session.optimizer.step_count
    return max(0, steps), bool(row.in_doubt)
