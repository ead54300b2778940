"""The limits of a request."""

from __future__ import annotations

import math

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.training.guard import Guard

FIELD = "spec.guard"
LIMITS = ("max_loss", "max_grad_norm", "max_update_ratio")
# Nats a token. Every token of an answer of up to 34 is then likelier than all others together.
MIN_LOSS = 0.02


def read_guard(guard: pb.Guard) -> Guard:
    """The limits of a request. Raises InvalidArgument with the path of each wrong field."""
    given = {n: getattr(guard, n) for n in LIMITS if guard.HasField(n)}  # type: ignore[arg-type]
    min_loss = guard.min_loss if guard.HasField("min_loss") else MIN_LOSS
    wrong = [
        FieldViolation(f"{FIELD}.{name}", f"is {value:g}; it must be finite and above 0")
        for name, value in given.items()
        if not (math.isfinite(value) and value > 0)
    ]
    if not (math.isfinite(min_loss) and min_loss >= 0):
        says = f"is {min_loss:g}; it must be finite, and 0 (off) or above"
        wrong.append(FieldViolation(f"{FIELD}.min_loss", says))
    if wrong:
        raise InvalidArgument(
            f"{wrong[0].field}: {wrong[0].description}", violations=wrong, reason="GUARD_INVALID"
        )
    return Guard(**given, min_loss=min_loss)
