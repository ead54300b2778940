"""Options of a run on the live optimizer: applied, or refused; never ignored."""

from __future__ import annotations

from dataclasses import dataclass

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.optim import Apollo
from apollo_trainer.optim.options import Schedule, Variant
from apollo_trainer.optim.rounding import RoundingMode


@dataclass(frozen=True)
class StateShape:
    """What the live optimizer state is like.

    A different rank or variant needs a new state, and so does rounding to or from split16, which
    keeps the weights' low bits there.
    """

    rank: int = 64
    variant: Variant = "channel"
    rounding: RoundingMode = "stochastic"

    def fits(self, other: StateShape) -> bool:
        """Whether a state of one shape can go on as the other."""
        return self._kept() == other._kept()

    def _kept(self) -> tuple[int, str, bool]:
        return self.rank, self.variant, self.rounding == "split16"

    def __str__(self) -> str:
        return f"(rank {self.rank}, {self.variant}, rounding {self.rounding})"


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of a run, checked; None means the live shape, or, for scale, the paper's factor.

    Attributes:
        schedule: how lr goes on after the warm-up, until the run's last step.
        final_lr_fraction: what the schedule leaves of lr, 0 to 1. With T steps, W of them warm-up,
            step n > W takes final + (1 - final) left(d) of lr, with d = (n - 1 - W) / (T - W):
            the last step is one short of the final fraction, as with transformers' schedules. For
            'linear' left(d) is 1 - d, for 'cosine' (1 + cos(pi d)) / 2.
        clip_grad_norm: of a step's policy; the optimizer does not know it. None is no limit.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    scale: float | None = None
    proj_refresh: int = 200
    norm_growth_limit: float = 1.01
    rank: int | None = None
    variant: Variant | None = None
    rounding: RoundingMode | None = None
    reset: bool = False
    accept_other_weights: bool = False
    schedule: Schedule = "constant"
    final_lr_fraction: float = 0.0
    clip_grad_norm: float | None = None

    def shape_on(self, live: StateShape) -> StateShape:
        """The shape that the state has once this run has begun.

        Raises FailedPrecondition when that is not the live one and no reset was asked for.
        """
        wanted = StateShape(
            rank=self.rank if self.rank is not None else live.rank,
            variant=self.variant or live.variant,
            rounding=self.rounding or live.rounding,
        )
        if not wanted.fits(live) and not self.reset:
            raise FailedPrecondition(
                f"The live optimizer state is {live}; the run asks for {wanted}. "
                "Nothing was changed. Leave these fields unset, or set reset_optimizer to drop "
                "the state and begin anew.",
                reason="OPTIMIZER_MISMATCH",
            )
        return wanted

    def apply(self, optimizer: Apollo, steps_total: int = 0) -> None:
        """Sets everything but the shape on the optimizer's groups, from its next step on.

        Args:
            steps_total: of the run; 0 is unknown, and lr is then constant after the warm-up.
        """
        for group in optimizer.param_groups:
            group.update(
                lr=self.lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                warmup_steps=self.warmup_steps,
                warmup_from=optimizer.step_count,
                scale=self.scale,
                proj_refresh=self.proj_refresh,
                norm_growth_limit=self.norm_growth_limit or None,
                schedule=self.schedule,
                final_lr_fraction=self.final_lr_fraction,
                steps_total=steps_total,
            )
