"""All weights to disk after an update of all: a sync beside other ways, in one process.

    python -m benchmarks.bench_checkpoint [--gib 1] [--shards 4] [--folder FOLDER]

A synthetic bfloat16 model. All ways run in turn, round after round, on the disk of `--folder`; the
median is reported. Some are not durable when they return: their names say so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_sync import SyncedModel
from benchmarks.machine import installed, origin, result_path, write_json
from benchmarks.saving_peers import PEERS

ROUNDS = 5
OURS = "sync, by exchange"


def measure(model: SyncedModel, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds and bytes of each way in each round; the first round of each is not counted."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "bytes": []} for name in (OURS, *PEERS)
    }
    for number in range(ROUNDS + 1):
        model.train(model.names)
        taken = {OURS: _sync(model)}
        weights = {name: p.detach().clone() for name, p in model.parameters.items()}
        for name, save in PEERS.items():
            _settle()
            began = time.perf_counter()
            written = save(weights, folder)
            taken[name] = (time.perf_counter() - began, written)
        if number:
            for name, (seconds, written) in taken.items():
                found[name]["seconds"].append(seconds)
                found[name]["bytes"].append(written)
    return found


def _settle() -> None:
    """Otherwise whoever flushes pays for what the one before left in the page cache."""
    os.sync()


def _sync(model: SyncedModel) -> tuple[float, int]:
    _settle()
    seconds, outcome = model.sync()
    return seconds, int(outcome.bytes_written)


def row(rounds: dict[str, list[float]], ours: dict[str, list[float]], gib: float) -> dict[str, Any]:
    """The figures of one way, and its time over ours within each round."""
    ratios = [a / b for a, b in zip(rounds["seconds"], ours["seconds"], strict=True)]
    return {
        "seconds_per_gib": statistics.median(rounds["seconds"]) / gib,
        "bytes_per_byte": statistics.median(rounds["bytes"]) / (gib * 2**30),
        "times_a_sync": statistics.median(ratios),
    }


def main() -> None:
    """Measures, prints and writes a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path.cwd() / "build")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=arguments.folder))
    try:
        model = SyncedModel(folder / "model", int(arguments.gib * 2**30), arguments.shards)
        found = measure(model, folder)
    finally:
        shutil.rmtree(folder)
    rows = {name: row(rounds, found[OURS], model.gib) for name, rounds in found.items()}
    for name, figures in rows.items():
        print(
            f"{name:36} {figures['seconds_per_gib']:7.3f} s/GiB  "
            f"{figures['bytes_per_byte']:6.3f} of the bytes  {figures['times_a_sync']:6.2f} times"
        )
    device = torch.device("cpu")
    result = origin(device) | {"gib": model.gib, "rounds": ROUNDS, "rows": rows}
    result["versions"] |= {n: installed(n) for n in ("safetensors", "transformers")}
    write_json(result_path("bench_checkpoint", device), result)


if __name__ == "__main__":
    main()
