"""Snapshots of a synthetic bfloat16 model on this machine: sizes, and how fast each part is.

    python benchmarks/bench_snapshots.py FOLDER [--mebibytes 512] [--updates 100] [--write]

FOLDER is on the disk to measure, and must not exist. Weights are N(0, 0.02); an update adds
N(0, 1e-5) to all, rounded stochastically, as in the design's table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import origin, result_path, write_json

from apollo_trainer.checkpoints.digest import digest
from apollo_trainer.checkpoints.restore import restore
from apollo_trainer.checkpoints.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots import SnapshotCopy
from apollo_trainer.checkpoints.undo_ring import UndoRing
from apollo_trainer.optim import Apollo

SIDE, UPDATES, SIZE = 4096, (1, 10, 100), 1e-5
ROUNDS = 3


def update(weight: torch.Tensor) -> None:
    """One dense update, rounded stochastically, in place."""
    exact = weight.float().add_(torch.randn(weight.shape), alpha=SIZE)
    noise = torch.randint(0, 2**16, weight.shape, dtype=torch.int32)
    bits = exact.view(torch.int32).add_(noise).bitwise_right_shift_(16)
    weight.data.copy_(bits.to(torch.int16).view(torch.bfloat16))


def best(work: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, Any]:
    """Seconds of the fastest round, and its result."""
    seconds, result = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main() -> None:
    """Measures and prints; `--write` keeps the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--updates", type=int, default=max(UPDATES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    count = options.mebibytes * 2**20 // (2 * SIDE * SIDE)
    weights = {
        f"layer.{n}": torch.nn.Parameter(torch.randn(SIDE, SIDE).mul_(0.02).bfloat16())
        for n in range(count)
    }
    optimizer = Apollo(weights.items(), rank=64)
    size = sum(p.nbytes for p in weights.values())
    moments = optimizer.state_size_bytes()
    store = SnapshotStore(options.folder)
    result: dict[str, Any] = {
        "bytes": size,
        "moments": moments / size,
        "digest": digest(torch.zeros(1)).partition(":")[0],
    }
    seconds, copying = best(lambda: SnapshotCopy(weights, optimizer))
    result["pause_ms"] = 1000 * seconds
    seconds, _ = best(copying.state, 1)
    result["copy_gb_s"] = size / seconds / 1e9
    seconds, _ = best(lambda: store.create(copying, "anchor"), 1)
    result["anchor_gb_s"] = size / seconds / 1e9
    for number in range(1, options.updates + 1):
        for weight in weights.values():
            update(weight)
        if number in UPDATES:
            result[f"after_{number}"] = one(store, weights, optimizer, size, moments, number)
    result["undo"] = undo(weights, optimizer, size)
    print(json.dumps(result, indent=2))
    shutil.rmtree(options.folder)
    if options.write:
        found = origin(torch.device("cpu")) | {"snapshots": result}
        write_json(result_path("bench_snapshots", torch.device("cpu")), found)


def one(
    store: SnapshotStore,
    weights: dict[str, torch.nn.Parameter],
    optimizer: Apollo,
    size: int,
    moments: int,
    number: int,
) -> dict[str, float]:
    """A snapshot of the weights, its load and its restore."""
    state = SnapshotCopy(weights, optimizer).state()
    anchor = store.list()[0].anchor
    encode, _ = best(lambda: store._anchors.encode(anchor, state))
    create, info = best(lambda: store.create(state, f"after {number}"), 1)
    load, loaded = best(lambda: store.load(info.id))
    put, _ = best(lambda: restore(loaded, weights, optimizer))
    return {
        "percent": 100 * (info.size_bytes - moments) / size,
        "encode_gb_s": size / encode / 1e9,
        "create_gb_s": size / create / 1e9,
        "load_gb_s": size / load / 1e9,
        "restore_gb_s": size / put / 1e9,
    }


def undo(weights: dict[str, torch.nn.Parameter], optimizer: Apollo, size: int) -> dict[str, float]:
    """One update recorded and taken back."""
    ring = UndoRing(size)
    ring.begin(weights, optimizer)
    start = time.perf_counter()
    for weight in weights.values():
        ring.before_write(weight)
    hook = time.perf_counter() - start
    for weight in weights.values():
        update(weight)
    ring.end(weights)
    start = time.perf_counter()
    kept = ring.size_bytes()
    encode = time.perf_counter() - start
    start = time.perf_counter()
    ring.undo(1, weights, optimizer)
    return {
        "percent_with_moments": 100 * kept / size,
        "hook_ms_per_gib": 1000 * hook / size * 2**30,
        "encode_gb_s": size / encode / 1e9,
        "undo_gb_s": size / (time.perf_counter() - start) / 1e9,
    }


if __name__ == "__main__":
    main()
