"""The mark of weights that are neither the old nor the new ones."""

from __future__ import annotations

from apollo_grpc.errors import DataLoss, FailedPrecondition


class PoisonedError(DataLoss):
    """A restore failed halfway, and so did putting the old weights back."""

    default_reason = "WEIGHTS_POISONED"


class Poison:
    """Set by a restore that left the live weights mixed; taken away by one that succeeds.

    Attributes:
        why: empty while the weights are sound.
    """

    def __init__(self) -> None:
        self.why = ""

    @property
    def refusal(self) -> str:
        """What a user reads; empty while the weights are sound."""
        if not self.why:
            return ""
        return (
            f"The live weights are mixed: {self.why} Nothing is trained or synced from them; "
            "the model directory is as it was. Restore a snapshot, or start vLLM anew."
        )

    def require_sound(self) -> None:
        """Raises FailedPrecondition while training and sync would go on with mixed weights."""
        if self.why:
            raise FailedPrecondition(self.refusal, reason="WEIGHTS_POISONED")
