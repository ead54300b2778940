"""A ledger with its writer, as the training server opens them."""

from __future__ import annotations

from pathlib import Path

from apollo_grpc.times import now
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.entries import Acceptance, Deletion
from apollo_trainer.ledger.events import EventLog
from apollo_trainer.ledger.retention import Retention
from apollo_trainer.runs.recovery import open_ledger
from tests.waiting import HANG

KEEP_ALL = Retention(seconds=1e9, bytes=2**40)
SPEC = pb.RunSpec(samples=[pb.Sample(weight=1.0)], epochs=3)


class Books:
    """A ledger with its writer, as a server opens them."""

    def __init__(self, folder: Path, retention: Retention = KEEP_ALL):
        self.ledger, self.writer, self.waiting = open_ledger(folder, retention)

    def accept(self, run_id: str, request_id: str = "", spec: pb.RunSpec = SPEC) -> EventLog:
        queued = pb.RunEvent(
            run_id=run_id, sequence=1, event_time=now(), queued=pb.RunEvent.Queued()
        )
        log = EventLog(run_id, lambda event: None, self.writer)
        log.begin_with(queued)
        self.writer.change(Acceptance(request_id, spec, 3, queued)).result(HANG)
        log.committed(1)
        return log

    def delete(self, run_id: str) -> None:
        self.writer.change(Deletion(run_id)).result(HANG)

    def close(self) -> None:
        self.writer.stop()
        self.ledger.close()


def finish(log: EventLog, steps: int = 0) -> None:
    """Ends a run."""
    finished = pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED, steps_done=steps)
    log.append(finished=finished)
