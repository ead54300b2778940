"""The optimizer's options: their validation, and the settings of a group fixed for one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Variant = Literal["channel", "mini"]
Impl = Literal["auto", "reference", "fused"]
Compat = Literal["apollo-torch"]

Schedule = Literal["constant", "linear", "cosine"]

# What older states do not say, and then is so.
NO_SCHEDULE: dict[str, Any] = {"schedule": "constant", "final_lr_fraction": 0.0, "steps_total": 0}
GROUP_OPTIONS = (
    "lr", "rank", "betas", "eps", "weight_decay", "warmup_steps", "warmup_from", "scale",
    "proj_refresh", "norm_growth_limit", *NO_SCHEDULE,
)  # fmt: skip
SCHEDULES = get_args(Schedule)
CHOICES: dict[str, tuple[str | None, ...]] = {
    "variant": ("channel", "mini"),
    "rounding": ("stochastic", "nearest", "split16"),
    "impl": ("auto", "reference", "fused"),
    "compat": (None, "apollo-torch"),
}


@dataclass(frozen=True)
class StepSettings:
    """What one step does to the parameters of one group.

    `number` counts the optimizer's steps from 1, `window` the refreshes of the projection from 0.
    `lr` is the learning rate after warm-up and schedule. `scale` None is sqrt(min(shape) / rank),
    and `norm_growth_limit` None switches the limiter off.
    """

    number: int
    window: int
    proj_refresh: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float | None
    norm_growth_limit: float | None
    variant: Variant
    compat: Compat | None

    def alpha(self, small: int, rank: int) -> float:
        """The factor on the scaled gradient of a matrix whose smaller side is `small`."""
        return math.sqrt(small / rank) if self.scale is None else self.scale


def settings_for(
    group: Mapping[str, Any], number: int, variant: Variant, compat: Compat | None
) -> StepSettings:
    """Fixes a group's settings for step `number`. Raises ValueError on an invalid option."""
    check_group(group)
    lr = float(group["lr"]) * _part_of_lr(group, number - group["warmup_from"])
    return StepSettings(
        number=number,
        window=(number - 1) // group["proj_refresh"],
        proj_refresh=group["proj_refresh"],
        lr=lr,
        betas=(group["betas"][0], group["betas"][1]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        scale=group["scale"],
        norm_growth_limit=group["norm_growth_limit"],
        variant=variant,
        compat=compat,
    )


def _part_of_lr(group: Mapping[str, Any], step: int) -> float:
    """What a run's step, from 1, takes of lr; as transformers' schedules, but for their warm-up.

    Warm-up reaches all of it at its last step. The schedule begins with all of it at the next one,
    and would reach `final_lr_fraction` at the step after the run's last.
    """
    warmup = group["warmup_steps"]
    if step <= warmup:
        return min(1.0, max(0.0, step / warmup)) if warmup else 1.0
    schedule, total = group["schedule"], group["steps_total"]
    if schedule == "constant" or not total:
        return 1.0
    done = min(1.0, (step - 1 - warmup) / max(1, total - warmup))
    left = 1.0 - done if schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    final = float(group["final_lr_fraction"])
    return final + (1.0 - final) * left


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first option of a group that is out of range."""
    _number("lr", group["lr"], at_least=0.0)
    _betas(group["betas"])
    _number("eps", group["eps"], above=0.0)
    _number("weight_decay", group["weight_decay"], at_least=0.0)
    _count("warmup_steps", group["warmup_steps"], 0)
    _count("warmup_from", group["warmup_from"], 0)
    _count("proj_refresh", group["proj_refresh"], 1)
    if group["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule is {group['schedule']!r}; it is one of {SCHEDULES}.")
    _number("final_lr_fraction", group["final_lr_fraction"], at_least=0.0)
    if group["final_lr_fraction"] > 1:
        raise ValueError(f"final_lr_fraction is {group['final_lr_fraction']!r}; it is at most 1.")
    _count("steps_total", group["steps_total"], 0)
    if group["rank"] is not None:
        _count("rank", group["rank"], 1)
    if group["scale"] is not None:
        _number("scale", group["scale"], above=0.0)
    if group["norm_growth_limit"] is not None:
        _number("norm_growth_limit", group["norm_growth_limit"], at_least=1.0)


def check_choices(seed: int, **chosen: str | None) -> None:
    """Raises ValueError naming the first option that belongs to the whole optimizer and is bad."""
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; it is one of {CHOICES[name]}.")
    _count("seed", seed, 0)
    if seed >= 2**63:
        raise ValueError(f"seed is {seed}; it must be below 2**63.")
    if chosen["impl"] == "fused" and chosen["compat"] is not None:
        raise ValueError(f"compat={chosen['compat']!r} has no fused path; use impl='reference'.")


def _number(
    name: str, value: Any, *, at_least: float = -math.inf, above: float = -math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number.")
    if value < at_least:
        raise ValueError(f"{name} is {value!r}; it must be at least {at_least:g}.")
    if value <= above:
        raise ValueError(f"{name} is {value!r}; it must be above {above:g}.")


def _count(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {at_least} on.")


def _betas(value: Any) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"betas is {value!r}; it must be two numbers.")
    for beta in value:
        _number("betas", beta, at_least=0.0)
        if beta >= 1.0:
            raise ValueError(f"betas is {value!r}; both must be below 1.")
