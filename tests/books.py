"""A ledger with its writer, as the training server opens them."""

from __future__ import annotations

from pathlib import Path

from apollo_grpc.times import now
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.runs.events import EventLog
from apollo_trainer.runs.ledger import Acceptance, Ledger
from apollo_trainer.runs.ledger_file import LedgerFile
from apollo_trainer.runs.ledger_writer import LedgerWriter, Store
from apollo_trainer.runs.recovery import settle
from apollo_trainer.runs.retention import Retention

KEEP_ALL = Retention(seconds=1e9, bytes=2**40)
SPEC = pb.RunSpec(samples=[pb.Sample(weight=1.0)], epochs=3)


class Books:
    """A ledger with its writer, as a server opens them."""

    def __init__(self, folder: Path, retention: Retention = KEEP_ALL):
        file = LedgerFile(folder)
        self.ledger = Ledger(file)
        self.waiting = settle(file, self.ledger, folder)
        self.writer = LedgerWriter(file, retention)

    def accept(self, run_id: str, request_id: str = "") -> EventLog:
        queued = pb.RunEvent(run_id=run_id, sequence=1, event_time=now(), queued=pb.Queued())
        log = EventLog(run_id, lambda event: None, Store(self.ledger, self.writer))
        log.begin_with(queued)
        self.writer.accept(Acceptance(request_id, SPEC, 3, queued)).result(10)
        log.committed(1)
        return log

    def close(self) -> None:
        self.writer.stop()
        self.ledger.close()


def finish(log: EventLog, steps: int = 0) -> None:
    """Ends a run."""
    finished = pb.Finished(state=pb.RUN_STATE_SUCCEEDED, steps_done=steps)
    log.append(finished=finished)
