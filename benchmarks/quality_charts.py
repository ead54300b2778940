"""The charts of a quality result."""

from __future__ import annotations

import math
from typing import Any

from quality_summary import best_cells, by_variant, cells, mean_curve
from svg import Axis, Series, line_chart

Result = dict[str, Any]
DASHED = "nearest"


def charts(result: Result) -> dict[str, str]:
    """The charts by their file names."""
    drawn = {"quality-curves.svg": _curves(result), "quality-rates.svg": _rates(result)}
    if "fine_tune" in result:
        drawn["quality-fine-tune.svg"] = _fine_curves(result["fine_tune"])
    return drawn


def _curves(result: Result) -> str:
    best, series = best_cells(result["runs"]), []
    for variant, cell in best.items():
        runs = [r for r in result["runs"] if r["variant"] == variant and r["lr"] == cell.lr]
        series.append(Series(f"{variant}, {cell.lr:g}", mean_curve(runs), "AdamW" in variant))
    # The first points are far above all others.
    later = [(x, y) for s in series for x, y in s.points if x >= 0.15 * result["plan"]["steps"]]
    y = _y_axis([value for _, value in later])
    x = Axis("step", 0, result["plan"]["steps"])
    return line_chart("Held-out loss at each variant's best rate", x, y, series)


def _rates(result: Result) -> str:
    series = [
        Series(
            variant,
            [(lr, c.mean if math.isfinite(c.mean) else None) for lr, c in by_rate.items()],
            "AdamW" in variant,
        )
        for variant, by_rate in cells(result["runs"]).items()
    ]
    rates = sorted({x for s in series for x, _ in s.points}) or [1.0]
    y = _y_axis([value for s in series for _, value in s.points])
    x = Axis("learning rate", rates[0], rates[-1], log=True, ticks=tuple(rates))
    return line_chart("Held-out loss over the learning rate", x, y, series)


def _fine_curves(fine: Result) -> str:
    series = [
        Series(v, mean_curve(runs), DASHED in v) for v, runs in by_variant(fine["runs"]).items()
    ]
    y = _y_axis([value for s in series for _, value in s.points])
    title = f"Held-out loss of new text, fine-tuning at {fine['lr']:g}"
    return line_chart(title, Axis("step", 0, fine["steps"]), y, series)


def _y_axis(values: list[float | None]) -> Axis:
    known = [value for value in values if value is not None] or [0.0, 1.0]
    margin = 0.04 * ((max(known) - min(known)) or 1.0)
    return Axis("nats a byte", min(known) - margin, max(known) + margin)
