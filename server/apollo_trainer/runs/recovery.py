"""After a crash: every run that had not ended is settled, before anything else is done.

What a killed server had not put into the ledger is in the run's journal. Queued runs are kept; one
that was at work ends as FAILED, with the steps that are in the weights.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from apollo_grpc.times import now
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import saved_steps
from apollo_trainer.runs.journal import (
    FOLDER,
    JournalContents,
    journals_in,
    read_journal,
    remove_journal,
)
from apollo_trainer.runs.ledger import Ledger, RunRow, write_events
from apollo_trainer.runs.ledger_file import LedgerFile

log = logging.getLogger(__name__)


def settle(file: LedgerFile, ledger: Ledger, state_dir: Path) -> list[RunRow]:
    """Ends the runs that a crash interrupted; returns those that wait, in order. At the start.

    Raises OSError or sqlite3.Error where the disk refuses; nothing is lost by trying again.
    """
    folder = state_dir / FOLDER
    journals = {run_id: read_journal(folder, run_id) for run_id in journals_in(folder)}
    _commit(file.writer, [e for j in journals.values() for e in _missing(ledger, j.events)])
    interrupted = [r for r in ledger.unfinished() if r.state == pb.RUN_STATE_RUNNING]
    for row in interrupted:
        journal = journals.get(row.run_id, JournalContents())
        finished = _interrupted(row, journal, saved_steps(state_dir, row.epoch))
        log.warning("run %s: %s", row.run_id, finished.failure.message)
        event = pb.RunEvent(
            run_id=row.run_id,
            sequence=row.last_sequence + 1,
            event_time=now(),
            finished=finished,
        )
        _commit(file.writer, [event])
    for run_id in journals:
        remove_journal(folder, run_id)
    return ledger.unfinished()


def _missing(ledger: Ledger, events: list[pb.RunEvent]) -> list[pb.RunEvent]:
    """Events that follow what the ledger has, without a gap."""
    row = ledger.run(events[0].run_id) if events else None
    missing: list[pb.RunEvent] = []
    if row is None or row.has_ended:
        return missing
    for event in events:
        if event.sequence == row.last_sequence + len(missing) + 1:
            missing.append(event)
    return missing


def _commit(connection: sqlite3.Connection, events: list[pb.RunEvent]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        write_events(connection, events)
        connection.execute("COMMIT")
    except BaseException:
        # SQLite may have done so itself; what refused must be told, not that.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _interrupted(row: RunRow, journal: JournalContents, saved: int | None) -> pb.Finished:
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
    return pb.Finished(
        state=pb.RUN_STATE_FAILED,
        failure=pb.Failure(reason="INTERRUPTED", message=message),
        steps_done=done,
        next_step_in_doubt=in_doubt,
        state_steps_lost=lost,
    )
