"""What people call a run: its name and its labels."""

from __future__ import annotations

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

MAX_BYTES = 256
MAX_LABELS = 64


def check_labels(spec: pb.RunSpec) -> None:
    """Raises InvalidArgument for what is too long or too many, or a label without a key."""
    keys, values = list(spec.labels), list(spec.labels.values())
    wrong = [
        FieldViolation(f"spec.{field}", says)
        for field, says, is_wrong in (
            ("name", f"is longer than {MAX_BYTES} bytes", _any_long([spec.name])),
            ("labels", f"are more than {MAX_LABELS}", len(keys) > MAX_LABELS),
            ("labels", "one has an empty key", "" in keys),
            ("labels", f"one is longer than {MAX_BYTES} bytes", _any_long(keys + values)),
        )
        if is_wrong
    ]
    if wrong:
        raise InvalidArgument(f"{wrong[0].field}: {wrong[0].description}", violations=wrong)


def _any_long(texts: list[str]) -> bool:
    return any(len(text.encode()) > MAX_BYTES for text in texts)
