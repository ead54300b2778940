"""`apollo plot`: the losses of a run as a chart of plain characters."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise

import typer

from apollo_client.command.display import Json
from apollo_client.command.logs import events_so_far
from apollo_client.command.outcome import reported_errors
from apollo_client.command.run_ids import Last, RunId, find_run

ROWS, LEAST_COLUMNS = 12, 10
# Of a loss, beside the chart.
_LABEL = 9


def command(
    context: typer.Context, run_id: RunId = None, last: Last = False, as_json: Json = False
) -> None:
    """Draw the loss of each step of a run, until now; where there are many, means of some."""
    with reported_errors(), context.obj.client() as client:
        run = client.get_run(find_run(client, run_id, last))
        steps = [e.step for e in events_so_far(client, run) if e.HasField("step")]
    # JSON has no number for the others.
    figures = {step.step: step.loss if math.isfinite(step.loss) else None for step in steps}
    if as_json:
        told = {"run_id": run.run_id, "steps": [*figures], "losses": [*figures.values()]}
        print(json.dumps(told))
        return
    known = {step: loss for step, loss in figures.items() if loss is not None}
    if not known:
        print(f"run {run.run_id} has no step with a loss")
        return
    width = max(LEAST_COLUMNS, shutil.get_terminal_size().columns - _LABEL - 3)
    print(f"loss of run {run.run_id}")
    print("\n".join(chart([*known.values()], width, ends=(min(known), max(known)))))


def chart(losses: Sequence[float], width: int, ends: tuple[int, int]) -> list[str]:
    """Lines of a chart whose columns are means of as many losses each as they must be.

    Args:
        losses: at least one, each finite.
        width: columns at most, beside the axis.
        ends: the first and the last step, below it.
    """
    means = _means(losses, width)
    low, high = min(means), max(means)
    rows = ROWS if high > low else 1
    heights = [round((m - low) / (high - low) * (rows - 1)) if high > low else 0 for m in means]
    lines = []
    for row in reversed(range(rows)):
        label = f"{low + (high - low) * row / max(rows - 1, 1):.4g}"
        marks = "".join("*" if height == row else " " for height in heights)
        lines.append(f"{label:>{_LABEL}} | {marks}".rstrip())
    first, last = f"step {ends[0]}", f"{ends[1]}"
    axis = f"{'':>{_LABEL}} +-{'-' * len(means)}"
    return [*lines, axis, f"{'':>{_LABEL}}   {first}{last:>{max(len(means) - len(first), 6)}}"]


def _means(losses: Sequence[float], count: int) -> list[float]:
    count = min(count, len(losses))
    cuts = [len(losses) * column // count for column in range(count + 1)]
    return [math.fsum(losses[a:b]) / (b - a) for a, b in pairwise(cuts)]
