"""Times as protobuf writes them."""

from __future__ import annotations

from google.protobuf import duration_pb2, timestamp_pb2


def now() -> timestamp_pb2.Timestamp:
    """The time as protobuf writes it."""
    stamp = timestamp_pb2.Timestamp()
    stamp.GetCurrentTime()
    return stamp


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as protobuf writes them."""
    made = duration_pb2.Duration()
    made.FromNanoseconds(int(seconds * 1e9))
    return made
