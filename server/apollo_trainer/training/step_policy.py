"""How a step is taken."""

from __future__ import annotations

from dataclasses import dataclass

from apollo_trainer.training.guard import NO_LIMITS, Guard
from apollo_trainer.training.objectives import DEFAULT_CLIP, Clip

TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class StepPolicy:
    """How a step is taken.

    Attributes:
        token_budget: continuation tokens of one micro-batch, padding included; of context tokens
            it may hold 16 times as many. A single sample may be larger. Where there is no memory
            for that many, a step is taken in smaller ones.
        dry_run: find everything, write nothing.
        clip: of the ratios of samples with a policy loss.
        clip_grad_norm: a gradient of a larger norm is scaled down to it before the moments see it;
            None is no limit.
        open_tokens: gradients flow through so many of the last tokens of each context too; these
            count as continuation tokens then.
    """

    token_budget: int = TOKEN_BUDGET
    guard: Guard = NO_LIMITS
    dry_run: bool = False
    clip: Clip = DEFAULT_CLIP
    clip_grad_norm: float | None = None
    open_tokens: int = 0


DEFAULT_POLICY = StepPolicy()
