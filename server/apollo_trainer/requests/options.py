"""The optimizer's options of a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.optim.options import Schedule, Variant
from apollo_trainer.optim.rounding import RoundingMode
from apollo_trainer.training.options import OptimizerOptions

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


SCHEDULES: dict[Any, Schedule] = {
    pb.SCHEDULE_CONSTANT: "constant",
    pb.SCHEDULE_LINEAR: "linear",
    pb.SCHEDULE_COSINE: "cosine",
}


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
    "final_lr_fraction": _Rule(lambda x: 0 <= x <= 1, "must be from 0 to 1"),
    "clip_grad_norm": _POSITIVE,
}


def read_options(config: pb.OptimizerConfig) -> OptimizerOptions:
    """The options of a request.

    Raises InvalidArgument with the path of each wrong field.
    """
    violations = [_check(config, name, rule) for name, rule in _RULES.items()]
    violations += [
        _check_enum(config, "variant", VARIANTS),
        _check_enum(config, "rounding", ROUNDINGS),
        _check_enum(config, "schedule", SCHEDULES),
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
        schedule=SCHEDULES.get(config.schedule, defaults.schedule),
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
