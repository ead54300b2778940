"""Writes docs/reliability.json and docs/reliability.md: `make reliability`.

Enumerates the crashes of every protocol, ours and others, and takes out each fsync of ours.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from benchmarks.machine import ROOT, write_json
from tests.checkpoints.crash_matrix import Counts, enumerate_crashes, flushes
from tests.checkpoints.crash_protocols import NAIVE, OURS, Protocol
from tests.checkpoints.crash_store import (
    enumerate_export_crashes,
    enumerate_store_crashes,
    export_flushes,
    store_flushes,
)

RESULT, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
WITHOUT_IMAGES = 60
COUNTED = ("operations", "images", "wrong", "mixed")
NAMES = {
    "exchange": "a folder with the new shards, exchanged with the old one (the default)",
    "exchange, over spare shards": "the same, where shards of three syncs before are written over",
    "rollforward": "new shards beside the old ones, a commit record, renames",
    "in_place": "written in place behind a redo log of values",
    "snapshots": "snapshots and their deletions",
    "export": "an export",
}
STORES: list[tuple[str, Callable[..., Counts], Callable[[], list[str]]]] = [
    ("snapshots", enumerate_store_crashes, store_flushes),
    ("export", enumerate_export_crashes, export_flushes),
]

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

Three snapshots and two deletions, and an export, are crashed likewise. There *wrong* is one that
exists and is not whole, that was reported and is gone, or that was deleted and is there; nothing
needs a recovery, so that there is no mix before one.
"""
HOLDERS = """\
## Who looks meanwhile

Whoever opens the model directory by its name gets the old weights or the new ones. Whoever holds
the directory itself, as a handle, a working directory, or a mount in another container, keeps the
generation that it holds, whole until the sync after the next. Then config.json goes first, so that
a loader fails and loads no rest of a model, and the folder ends empty: restart such a container
after syncs, or mount the directory's parent. A directory that is bound to a second path that the
server itself sees is not exchanged but rolled forward, so that both paths show every sync.

A loader that opens several shards by their paths, one after the other, may open the first before
a sync and the second after it. One that must not opens the directory, and loads
`/proc/self/fd/N` of that handle; or, where the directory is rolled forward too, it loads an export,
which never changes.
(`tests/checkpoints/directory/test_holders.py`, which looks 10,000 times.)

"""
WITHOUT = """\
## Every fsync is needed

Each of these fsyncs was taken out in turn, and the matrix run again until something was wrong. A
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
    for store, crashes, flushed in STORES:
        rows.append({"protocol": store, "ours": True} | _numbers(crashes(images=images, seed=seed)))
        print(rows[-1], flush=True)
        for at, name in enumerate(flushed()):
            counts = crashes(images=WITHOUT_IMAGES, seed=2, without=at, stop_when_bad=True)
            without.append(_row(store, at, name, counts))
    return {"images": images, "seed": seed, "protocols": rows, "without": without}


def _numbers(counts: Any) -> dict[str, int]:
    return {key: getattr(counts, key) for key in COUNTED}


def _seen(row: dict[str, Any]) -> str:
    return "seen" if row["seen"] else "not seen"


def _without(protocol: Protocol, number: int, name: str) -> dict[str, Any]:
    counts = enumerate_crashes(
        protocol, images=WITHOUT_IMAGES, seed=2, without=number, stop_when_bad=True
    )
    return _row(protocol.name, number, name, counts)


def _row(protocol: str, number: int, name: str, counts: Counts) -> dict[str, Any]:
    # Names that are drawn would make each page another one.
    name = re.sub(r"[0-9a-f]{12}", "...", name)
    return {
        "protocol": protocol, "fsync": number + 1, "of": name, "seen": counts.bad,
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
            HOLDERS + WITHOUT,
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
