"""Options of a run on the live optimizer: applied, or refused; never ignored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apollo_grpc.errors import FailedPrecondition, FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.optim import Apollo
from apollo_trainer.optim.options import Variant
from apollo_trainer.optim.rounding import RoundingMode

FIELD = "spec.optimizer"
VARIANTS: dict[Any, Variant] = {
    pb.OPTIMIZER_VARIANT_CHANNEL: "channel",
    pb.OPTIMIZER_VARIANT_MINI: "mini",
}
ROUNDINGS: dict[Any, RoundingMode] = {
    pb.ROUNDING_STOCHASTIC: "stochastic",
    pb.ROUNDING_NEAREST: "nearest",
    pb.ROUNDING_SPLIT16: "split16",
}


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
    """Options of a run, checked; None means the live shape, or, for scale, the paper's factor."""

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

    def apply(self, optimizer: Apollo) -> None:
        """Sets everything but the shape on the optimizer's groups, from its next step on."""
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
            )


@dataclass(frozen=True)
class _Rule:
    holds: Callable[[float], bool]
    says: str


_POSITIVE = _Rule(lambda x: x > 0, "must be above 0")
_NOT_NEGATIVE = _Rule(lambda x: x >= 0, "must not be negative")
_BELOW_ONE = _Rule(lambda x: 0 <= x < 1, "must be at least 0 and below 1")
_RULES = {
    "lr": _NOT_NEGATIVE,
    "rank": _POSITIVE,
    "beta1": _BELOW_ONE,
    "beta2": _BELOW_ONE,
    "eps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "scale": _POSITIVE,
    "proj_refresh": _POSITIVE,
    "norm_growth_limit": _Rule(lambda x: x == 0 or x >= 1, "must be 0 (off) or at least 1"),
}


def read_options(config: pb.OptimizerConfig) -> OptimizerOptions:
    """The options of a request.

    Raises InvalidArgument with the path of each wrong field.
    """
    violations = [_check(config, name, rule) for name, rule in _RULES.items()]
    violations += [
        _check_enum(config, "variant", VARIANTS),
        _check_enum(config, "rounding", ROUNDINGS),
    ]
    wrong = [v for v in violations if v]
    if wrong:
        raise InvalidArgument(
            f"{wrong[0].field}: {wrong[0].description}", violations=wrong, reason="OPTION_INVALID"
        )
    given = {n: getattr(config, n) for n in _RULES if config.HasField(n)}  # type: ignore[arg-type]
    defaults = OptimizerOptions()
    betas = (given.pop("beta1", defaults.betas[0]), given.pop("beta2", defaults.betas[1]))
    return OptimizerOptions(
        betas=betas,
        variant=VARIANTS.get(config.variant),
        rounding=ROUNDINGS.get(config.rounding),
        reset=config.reset_optimizer,
        accept_other_weights=config.accept_other_weights,
        **given,
    )


def _check(config: pb.OptimizerConfig, name: str, rule: _Rule) -> FieldViolation | None:
    if not config.HasField(name):  # type: ignore[arg-type]
        return None
    value = getattr(config, name)
    if not math.isfinite(value):
        return FieldViolation(f"{FIELD}.{name}", f"is {value}; it must be finite")
    return (
        None
        if rule.holds(value)
        else FieldViolation(f"{FIELD}.{name}", f"is {value:g}; it {rule.says}")
    )


def _check_enum(
    config: pb.OptimizerConfig, name: str, known: Mapping[Any, str]
) -> FieldViolation | None:
    value = getattr(config, name)
    if value == 0 or value in known:
        return None
    return FieldViolation(f"{FIELD}.{name}", f"is {value}, which this version does not know")
