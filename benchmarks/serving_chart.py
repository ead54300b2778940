"""Draws a result of `bench_serving`: tokens that vLLM keeps, over the steps beside them.

python -m benchmarks.serving_chart RESULT.json docs/images/serving.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.svg import Axis, Series, line_chart


def picture(result: dict[str, Any]) -> str:
    """A dot for each way of sharing and each mode."""
    dots = {
        f"{sharing}, {mode}" if len(result["sharing"]) > 1 else mode: row
        for sharing, rows in result["sharing"].items()
        for mode, row in rows.items()
        if "steps_per_second" in row and "share" in row
    }
    most = max(row["steps_per_second"] for row in dots.values())
    sample = result["sample"]
    title = f"Tokens beside steps of {sample['context']} + {sample['learned']} tokens"
    return line_chart(
        title,
        Axis("steps a second", 0, float(round(most + 1))),
        Axis("part of idle vLLM's tokens", 0.5, 1.0),
        [Series(name, [(row["steps_per_second"], row["share"])]) for name, row in dots.items()],
    )


def main() -> None:
    """Reads the result, and writes the picture."""
    result, to = map(Path, sys.argv[1:])
    to.write_text(picture(json.loads(result.read_text())))


if __name__ == "__main__":
    main()
