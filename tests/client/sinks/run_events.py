"""A run's events as a server tells them, for sinks to keep."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from apollo_grpc.v1 import training_pb2 as pb

RUN = "0a1b2c3d"


def step(number: int) -> pb.RunEvent.Step:
    """A step whose figures tell its number."""
    return pb.RunEvent.Step(
        step=number,
        loss=1 / number,
        tokens=10 * number,
        learning_rate=1e-5,
        forward_time=Duration(nanos=number * 10**6),
    )


def events(steps: int, run_id: str = RUN) -> list[pb.RunEvent]:
    """Queued, started, evaluated, the steps, evaluated again, and finished."""
    found = [
        pb.RunEvent(queued=pb.RunEvent.Queued()),
        pb.RunEvent(started=pb.RunEvent.Started(steps_total=steps)),
        pb.RunEvent(evaluated=pb.RunEvent.Evaluated(losses=[4.0, 2.0])),
        *(pb.RunEvent(step=step(number + 1)) for number in range(steps)),
        pb.RunEvent(
            evaluated=pb.RunEvent.Evaluated(after_training=True, step=steps, losses=[1.0, 0.5])
        ),
        pb.RunEvent(finished=pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED)),
    ]
    for sequence, event in enumerate(found, 1):
        event.run_id, event.sequence = run_id, sequence
        event.event_time.CopyFrom(Timestamp(seconds=1_700_000_000 + sequence))
    return found
