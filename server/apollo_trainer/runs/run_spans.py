"""The end of a run's span, with what the run came to."""

from __future__ import annotations

from collections.abc import Mapping

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.runs.run import QueuedRun


def end_span(event: pb.RunEvent, runs: Mapping[str, QueuedRun]) -> None:
    """Ends the span of a run whose last event this is. Any thread."""
    if not event.HasField("finished") or (entry := runs.get(event.run_id)) is None:
        return
    finished = event.finished
    entry.span.end(
        failed=finished.HasField("failure"),
        run_id=event.run_id,
        state=pb.RunState.Name(finished.state),
        reason=finished.failure.reason,
        steps=finished.steps_done,
        paused_seconds=finished.pause_time.seconds + finished.pause_time.nanos / 1e9,
    )
