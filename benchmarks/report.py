"""The table of a benchmark run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
WIDTH = 30


def _scaled(key: str, factor: float, digits: int) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else f"{value * factor:.{digits}f}"

    return show


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("ms", _scaled("ms", 1, 2)),
    ("ms/1e9", _scaled("ms_per_1e9", 1, 2)),
    ("/floor", _scaled("ratio_to_floor", 1, 2)),
    ("/apollo-torch", _scaled("ratio_to_apollo_torch", 1, 3)),
    ("prepare ms", _scaled("ms_prepare", 1, 2)),
    ("alone ms", _scaled("ms_alone", 1, 2)),
    ("refresh ms", _scaled("ms_refresh", 1, 2)),
    ("window ms", _scaled("ms_window_average", 1, 2)),
    ("state MB", _scaled("state_bytes", 1e-6, 1)),
    ("B/param", _scaled("state_bytes_per_parameter", 1, 3)),
    ("peak MB", _scaled("peak_extra_bytes", 1e-6, 1)),
)
NOTES = """\
ms: median of the timed steps, none of which draws a new projection. prepare: what of it is the norm
of gradients that are factors, and memory for the write. alone: from an idle device until it is
idle again. refresh: a step that draws one. window: the average over one projection's steps,
computed from both. state: exact. peak: the most that the steps added to the memory in use before
them."""


def complete(rows: list[Row], window: int) -> None:
    """Adds what follows from the measured figures: per parameter, to the floor, to apollo-torch."""
    theirs = {
        (r["dtype"], r["rank"]): r["ms"]
        for r in rows
        if r["family"] == "apollo-torch" and "skipped" not in r
    }
    for row in rows:
        if "skipped" in row:
            continue
        row["ms_per_1e9"] = row["ms"] / (row["parameters"] / 1e9)
        row["ratio_to_floor"] = row["ms"] / row["floor_ms"]
        row["state_bytes_per_parameter"] = row["state_bytes"] / row["parameters"]
        if "ms_refresh" in row:
            row["ms_window_average"] = ((window - 1) * row["ms"] + row["ms_refresh"]) / window
        same = (row["dtype"], row["rank"])
        if row["family"] == "apollo" and same in theirs:
            row["ratio_to_apollo_torch"] = row["ms"] / theirs[same]


def table(result: dict[str, Any]) -> str:
    """The whole run as text."""
    lines = [_heading(result)]
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        lines += ["", f"{dtype}: floor {_floors(rows)}"]
        lines.append(f"{'':{WIDTH}}" + "".join(f"{name:>14}" for name, _ in COLUMNS))
        lines += [_line(row) for row in rows]
    return "\n".join([*lines, "", NOTES])


def _floors(rows: list[Row]) -> str:
    """Of whole gradients, and of factors; each row's ratio is to its own."""
    floors = {row["tokens"]: row["floor_ms"] for row in rows}
    return ", ".join(
        f"{ms:.2f} ms" + (f" with factors of {tokens} tokens" if tokens else "")
        for tokens, ms in floors.items()
    )


def _heading(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{machine['device']}; {machine['cores']} cores, {machine['threads']} threads; {known}\n"
        f"commit {result['commit']}; {result['shapes']}, {result['parameters']:,} parameters; "
        f"copy {result['copy_bytes_per_second'] / 1e9:.0f} GB/s (read + written)"
    )


def _line(row: Row) -> str:
    if "skipped" in row:
        return f"{row['name']:{WIDTH}}  skipped: {row['skipped']}"
    return f"{row['name']:{WIDTH}}" + "".join(f"{show(row):>14}" for _, show in COLUMNS)
