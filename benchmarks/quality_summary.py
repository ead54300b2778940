"""Means, noise and comparisons over the seeds of a quality result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """The runs of one variant at one learning rate, over the seeds; None where one diverged."""

    variant: str
    lr: float
    losses: dict[int, float | None]

    @property
    def mean(self) -> float:
        """Infinite where a seed diverged: such a rate is never the best."""
        known = [loss for loss in self.losses.values() if loss is not None]
        return statistics.fmean(known) if len(known) == len(self.losses) else math.inf

    @property
    def std(self) -> float | None:
        """Over the seeds; None where there are fewer than two, or where one diverged."""
        known = [loss for loss in self.losses.values() if loss is not None]
        complete = len(known) == len(self.losses) and len(known) > 1
        return statistics.stdev(known) if complete else None

    def shown(self) -> str:
        """Mean and standard deviation as text."""
        if not math.isfinite(self.mean):
            diverged = sum(loss is None for loss in self.losses.values())
            return f"diverged ({diverged} of {len(self.losses)})"
        return f"{self.mean:.4f}" + ("" if self.std is None else f" ± {self.std:.4f}")


@dataclass(frozen=True)
class Difference:
    """Loss of one cell minus another's, seed by seed: both saw the same batches and start."""

    mean: float
    std: float | None
    noise: float | None
    same_sign: bool

    @property
    def within_noise(self) -> bool | None:
        """Whether it is below the larger of both cells' spreads; None where that is unknown."""
        return None if self.noise is None else abs(self.mean) <= self.noise

    def shown(self) -> str:
        """Signed mean and standard deviation as text."""
        return f"{self.mean:+.4f}" + ("" if self.std is None else f" ± {self.std:.4f}")


def cells(runs: Iterable[Run]) -> dict[str, dict[float, Cell]]:
    """Variant, then learning rate in rising order."""
    losses: dict[str, dict[float, dict[int, float | None]]] = {}
    for run in runs:
        of_rate = losses.setdefault(run["variant"], {}).setdefault(run["lr"], {})
        of_rate[run["seed"]] = run["final"]
    return {
        variant: {lr: Cell(variant, lr, by_rate[lr]) for lr in sorted(by_rate)}
        for variant, by_rate in losses.items()
    }


def best_cells(runs: Iterable[Run]) -> dict[str, Cell]:
    """The cell of the lowest mean of each variant that has one without divergence."""
    found = {}
    for variant, by_rate in cells(runs).items():
        best = min(by_rate.values(), key=lambda cell: cell.mean)
        if math.isfinite(best.mean):
            found[variant] = best
    return found


def best_rates(runs: Iterable[Run]) -> dict[str, float]:
    """The best learning rate of each variant."""
    return {variant: cell.lr for variant, cell in best_cells(runs).items()}


def best_summary(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """The best rate of each variant with mean and deviation, as JSON can hold them."""
    return {
        variant: {"lr": cell.lr, "mean": cell.mean, "std": cell.std, "seeds": len(cell.losses)}
        for variant, cell in best_cells(runs).items()
    }


def difference(one: Cell, other: Cell) -> Difference:
    """`one` minus `other` over the seeds that both have. Negative: `one` is better."""
    gaps = [
        loss - theirs
        for seed, loss in one.losses.items()
        if loss is not None and (theirs := other.losses.get(seed)) is not None
    ]
    spreads = [s for s in (one.std, other.std) if s is not None]
    return Difference(
        statistics.fmean(gaps) if gaps else math.nan,
        statistics.stdev(gaps) if len(gaps) > 1 else None,
        max(spreads) if len(spreads) == 2 else None,
        len({gap > 0 for gap in gaps}) == 1,
    )


def by_variant(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each variant, in their order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["variant"], []).append(run)
    return found


def mean_curve(runs: Sequence[Run]) -> list[tuple[float, float | None]]:
    """The mean over runs of their curves; None where one diverged."""
    points = []
    for column in zip(*(run["curve"] for run in runs), strict=True):
        losses = [loss for _, loss in column if loss is not None]
        mean = statistics.fmean(losses) if len(losses) == len(column) else None
        points.append((column[0][0], mean))
    return points


def mean_of(runs: Iterable[Run], key: str) -> float:
    """The mean of one figure over runs; NaN where none has it."""
    known = [run[key] for run in runs if run.get(key) is not None]
    return statistics.fmean(known) if known else math.nan


def gain(run: Run) -> float:
    """How much the loss fell from the first point of the curve to the last; NaN if unknown."""
    first, last = run["curve"][0][1], run["curve"][-1][1]
    return math.nan if first is None or last is None else first - last
