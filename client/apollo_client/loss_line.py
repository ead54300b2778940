"""A line of losses as SVG, which every browser and most viewers show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

# Of the axes, in the picture's units.
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 704, 32, 328
_TEMPLATE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 360" width="720" \
height="360" font-family="sans-serif" font-size="12">
<rect width="720" height="360" fill="white"/>
<path d="M64 32V328H704" fill="none" stroke="#888"/>
<path d="{line}" fill="none" stroke="#1f6feb" stroke-width="2" stroke-linecap="round" \
stroke-linejoin="round"/>
<text x="64" y="20">{title}: loss in nats a token</text>
<text x="58" y="36" text-anchor="end">{highest:.4g}</text>
<text x="58" y="332" text-anchor="end">{lowest:.4g}</text>
<text x="64" y="348">step {first}</text>
<text x="704" y="348" text-anchor="end">step {last}</text>
</svg>
"""


def loss_line(title: str, steps: Sequence[int], losses: Sequence[float]) -> str:
    """The picture; losses that are no finite numbers leave a gap.

    Args:
        steps: at least one.
        losses: as many.
    """
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    lowest, highest = min(finite), max(finite)
    first, last = steps[0], steps[-1]
    line, pen = "", "M"
    for step, loss in zip(steps, losses, strict=True):
        if not math.isfinite(loss):
            pen = "M"
            continue
        x = _LEFT + (_RIGHT - _LEFT) * _part(step, first, last)
        y = _BOTTOM - (_BOTTOM - _TOP) * _part(loss, lowest, highest)
        # A lone point is a line to itself, which its round end makes a dot.
        line += f"{pen}{x:.1f} {y:.1f}" + f"L{x:.1f} {y:.1f}" * (pen == "M")
        pen = "L"
    values = {"lowest": lowest, "highest": highest, "first": first, "last": last}
    return _TEMPLATE.format(line=line, title=escape(title), **values)


def _part(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5
