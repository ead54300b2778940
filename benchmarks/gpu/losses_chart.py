"""The picture of a result of `bench_losses.py`."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.svg import Axis, Band, Series, below_one_another, line_chart

Curves = dict[str, list[float]]


def picture(result: dict[str, Any]) -> str:
    """The curves of all families, and for each of them how far its runs are from the plain one."""
    curves = {
        name: {run: each["losses"] for run, each in found["runs"].items()}
        for name, found in result["families"].items()
    }
    return below_one_another([_losses(curves), *(_distances(*each) for each in curves.items())])


def _losses(families: dict[str, Curves]) -> str:
    lines = [
        _line(f"{name}, {run}", curves[run], dashed=run == "plain")
        for name, curves in families.items()
        for run in ("fast", "plain")
    ]
    top = math.ceil(max(max(curves["fast"] + curves["plain"]) for curves in families.values()))
    y = Axis("loss, nats a token", 0, top, ticks=tuple(range(0, top + 1, 2)))
    return line_chart("Losses of fast and of plain steps, bfloat16", _steps(lines), y, lines)


def _distances(name: str, curves: Curves) -> str:
    far = {
        run: [a - b for a, b in zip(losses, curves["plain"], strict=True)]
        for run, losses in curves.items()
    }
    lines = [_line("fast", far["fast"]), _line("autograd", far["autograd"], dashed=True)]
    seeds = zip(*(values for run, values in far.items() if run.startswith("plain")), strict=True)
    band = Band("plain, other seeds", [(n, min(s), max(s)) for n, s in enumerate(seeds, 1)])
    most = max(abs(nats) for each in far.values() for nats in each) or 1.0
    y = Axis("nats a token", -most, most, ticks=(-most, -most / 2, 0.0, most / 2, most))
    return line_chart(f"{name}: loss minus that of plain steps", _steps(lines), y, lines, [band])


def _line(name: str, values: list[float], dashed: bool = False) -> Series:
    return Series(name, list(enumerate(values, 1)), dashed, dots=False)


def _steps(lines: list[Series]) -> Axis:
    return Axis("step", 0, len(lines[0].points))
