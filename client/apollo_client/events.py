"""What an event of a run tells, for Python's `match`."""

from __future__ import annotations

from typing import TypeAlias

from apollo_grpc.v1 import training_pb2 as pb

Queued: TypeAlias = pb.RunEvent.Queued
Started: TypeAlias = pb.RunEvent.Started
Step: TypeAlias = pb.RunEvent.Step
Evaluated: TypeAlias = pb.RunEvent.Evaluated
StateSaved: TypeAlias = pb.RunEvent.StateSaved
Notice: TypeAlias = pb.Notice
Finished: TypeAlias = pb.RunEvent.Finished
Probed: TypeAlias = pb.RunEvent.Probed
Happened: TypeAlias = Queued | Started | Step | Evaluated | StateSaved | Notice | Finished | Probed


def happened(event: pb.RunEvent) -> Happened | None:
    """The one of its messages that an event has; a `Notice` is a warning.

    None for a kind of a newer server that this client does not know, which is to be passed over,
    and for an event that is not set, as in the first answer of `watch_runs`.
    """
    kind = event.WhichOneof("event")
    if kind is None:
        return None
    message: Happened = getattr(event, kind)
    return message
