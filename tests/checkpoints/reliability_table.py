"""Writes docs/reliability.json and docs/reliability.md: `make reliability`.

Enumerates the crashes of every protocol, ours and others, and takes out each fsync of ours.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.machine import ROOT, write_json
from tests.checkpoints.crash_matrix import enumerate_crashes, flushes
from tests.checkpoints.crash_protocols import NAIVE, OURS, Protocol

RESULT, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
WITHOUT_IMAGES = 60
COUNTED = ("operations", "images", "wrong", "mixed")
NAMES = {
    "exchange": "a folder with the new shards, exchanged with the old one (the default)",
    "exchange, over the last but one": "the same, where the folder before is written over",
    "rollforward": "new shards beside the old ones, a commit record, renames",
    "in_place": "written in place behind a redo log of values",
}

HEAD = """\
# What a crash leaves

Written by `make reliability`, not by hand.

A sync runs on a file system in memory that knows what a power failure may leave
(`tests/checkpoints/crash_recorder.py`): a write is on disk after the file's fsync, a name after the
fsync of every folder that it concerns, and what is not may be there or not, each 512 bytes and each
name for itself, in any combination. Two syncs in a row of three shards are crashed before every
operation, {images} times each with other remains; the recovery is crashed too, up to twice. *Wrong*
is a directory that is not wholly of the old or the new weights after that, whose manifest is of
another generation, whose sync had returned and is gone, or that was refused; one image in sixteen
is synced once more. *Mixed* is what a loader that knows nothing of recovery would load without an
error, right after the crash. The code that runs is the product's own.
"""
WITHOUT = """\
## Every fsync is needed

Each fsync of a sync was taken out in turn, and the matrix run again until something was wrong. A
line that says *not seen* would be an fsync that protects nothing, or a matrix that is blind.
"""


def measure(images: int, seed: int) -> dict[str, Any]:
    """The counts of all protocols, and of ours without each fsync."""
    rows, without = [], []
    for protocol in (*NAIVE, *OURS):
        counts = enumerate_crashes(protocol, images=images, seed=seed)
        rows.append({"protocol": protocol.name, "ours": protocol.ours} | _numbers(counts))
        print(rows[-1], flush=True)
    for protocol in OURS:
        without += [_without(protocol, at, name) for at, name in enumerate(flushes(protocol))]
    return {"images": images, "seed": seed, "protocols": rows, "without": without}


def _numbers(counts: Any) -> dict[str, int]:
    return {key: getattr(counts, key) for key in COUNTED}


def _seen(row: dict[str, Any]) -> str:
    return "seen" if row["seen"] else "not seen"


def _without(protocol: Protocol, number: int, name: str) -> dict[str, Any]:
    counts = enumerate_crashes(
        protocol, images=WITHOUT_IMAGES, seed=2, without=number, stop_when_bad=True
    )
    return {
        "protocol": protocol.name, "fsync": number + 1, "of": name, "seen": counts.bad,
        "images": counts.images,
    }  # fmt: skip


def page(result: dict[str, Any]) -> str:
    """The page of a result."""
    rows = [
        (NAMES.get(row["protocol"], row["protocol"]), *(row[key] for key in COUNTED))
        for row in result["protocols"]
    ]
    lost = [
        (r["protocol"], r["fsync"], f"`{r['of']}`", _seen(r), r["images"])
        for r in result["without"]
    ]
    head = ("protocol", "crash points", "crashes", "wrong after recovery", "mixed before it")
    return "\n".join(
        [
            HEAD.format(images=result["images"]),
            _table(head, rows),
            WITHOUT,
            _table(("protocol", "fsync", "of", "without it", "crashes until seen"), lost),
        ]
    )


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main() -> None:
    """Measures, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    result = measure(arguments.images, arguments.seed)
    write_json(RESULT, result)
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
