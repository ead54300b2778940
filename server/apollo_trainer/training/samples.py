"""What a step learns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids of the served model's vocabulary; the continuation is what is learned.

    Attributes:
        weight: factor on the whole sample's loss.
        token_weights: one factor a continuation token, or empty for 1 each.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    weight: float = 1.0
    token_weights: tuple[float, ...] = ()
