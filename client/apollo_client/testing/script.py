"""What runs of a fake server play."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import training_pb2 as pb

# As of a server, in nats a token.
MIN_LOSS = 0.02


@dataclass(frozen=True)
class Script:
    """What every run plays, anew from its first step.

    Attributes:
        losses: of the first step, the second and so on; the last one stays. How many steps there
            are is the spec's to say, as on a training server. One that is not finite, or that the
            run's guard refuses, ends the run as there.
        fail_with: reason and message of the failure that a run ends with, at `fail_at_step`.
        step_seconds: how long a step takes, and each of four parts of an operation.
    """

    losses: Sequence[float] = (3.0, 2.0, 1.0)
    fail_with: tuple[str, str] | None = None
    fail_at_step: int = 1
    step_seconds: float = 0.005

    def __post_init__(self) -> None:
        if len(self.losses) == 0:
            raise ValueError("losses are empty: a run needs one for its first step")

    def loss(self, step: int) -> float:
        """Loss of a step, from 1."""
        return self.losses[min(step, len(self.losses)) - 1]

    def require_step(self, step: int, guard: pb.Guard) -> None:
        """Raises FailedPrecondition with the reason for which a step is not taken."""
        loss = self.loss(step)
        if self.fail_with and step >= self.fail_at_step:
            reason, words = self.fail_with
        elif not math.isfinite(loss):
            reason, words = "NONFINITE_LOSS", f"The loss of step {step} is {loss}."
        elif guard.HasField("max_loss") and loss > guard.max_loss:
            reason = "GUARD_MAX_LOSS"
            words = f"The loss of step {step} is {loss:g}, above max_loss {guard.max_loss:g}."
        else:
            return
        raise FailedPrecondition(words, reason=reason)
