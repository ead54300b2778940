"""Snapshots, undo and restore of a synthetic bfloat16 model: sizes, and how fast each part is.

    python benchmarks/bench_snapshots.py FOLDER [--mebibytes 512] [--updates 100]
        [--device cuda] [--write]

FOLDER is on the disk to measure, and must not exist. Weights are N(0, 0.02); an update adds
N(0, 1e-5) to all, rounded stochastically, as in the design's table. Files are warm, and the loops
compiled: how long that takes is in the result. GB/s are bytes of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import origin, result_path, write_json

from apollo_trainer.checkpoints.delta_file import decode_tensor, encode_tensor
from apollo_trainer.checkpoints.digest import digest
from apollo_trainer.checkpoints.frames import FRAME
from apollo_trainer.checkpoints.restore import restore
from apollo_trainer.checkpoints.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots import SnapshotCopy
from apollo_trainer.checkpoints.spread import background_threads, threads_for
from apollo_trainer.checkpoints.undo_ring import UndoRing
from apollo_trainer.optim import Apollo

SIDE, UPDATES, SIZE = 4096, (1, 10, 100), 1e-5
ROUNDS = 3

Weights = dict[str, torch.nn.Parameter]


def update(weight: torch.Tensor) -> None:
    """One dense update, rounded stochastically, in place."""
    here = {"device": weight.device}
    exact = weight.float().add_(torch.randn(weight.shape, **here), alpha=SIZE)
    noise = torch.randint(0, 2**16, weight.shape, dtype=torch.int32, **here)
    bits = exact.view(torch.int32).add_(noise).bitwise_right_shift_(16)
    weight.data.copy_(bits.to(torch.int16).view(torch.bfloat16))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done, and the result."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def best(work: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, Any]:
    """Seconds of the fastest round, and the last result."""
    seconds, result = [], None
    for _ in range(rounds):
        # The memory of the last result is not needed again for this one.
        result = None
        each, result = timed(work)
        seconds.append(each)
    return min(seconds), result


def measure(
    folder: Path, *, mebibytes: int = 512, updates: int = max(UPDATES), device: str = "cpu"
) -> dict[str, Any]:
    """All figures: sizes in percent of the weights, GB/s, ms, ms per GiB of weights.

    Args:
        folder: is made and removed; its disk is what anchors and snapshots are written to.
        updates: sizes are measured after 1, 10 and 100 of them, as far as this goes.
    """
    torch.manual_seed(0)
    weights = {
        f"layer.{n}": torch.nn.Parameter(
            torch.randn(SIDE, SIDE).mul_(0.02).bfloat16().to(device), requires_grad=True
        )
        for n in range(mebibytes * 2**20 // (2 * SIDE * SIDE))
    }
    optimizer = Apollo(weights.items(), rank=64)
    size = sum(p.nbytes for p in weights.values())
    result: dict[str, Any] = {
        "bytes": size,
        "moments": optimizer.state_size_bytes() / size,
        "digest": digest(torch.zeros(1)).partition(":")[0],
        "device": device,
        "processors": os.cpu_count(),
        "threads": threads_for(size),
        "background_threads": background_threads(size),
        "compile_s": compile_seconds(),
    }
    store = SnapshotStore(folder)
    try:
        result |= first(store, weights, optimizer, size)
        for number in range(1, updates + 1):
            for weight in weights.values():
                update(weight)
            if number in UPDATES:
                result[f"after_{number}"] = one(store, weights, optimizer, size, number)
        result["undo"] = undo(weights, optimizer, size)
    finally:
        shutil.rmtree(folder)
    return result


def compile_seconds() -> float:
    """What the first frame of a process takes longer than the second."""
    old = torch.zeros(FRAME).bfloat16()
    new = old + 1

    def there_and_back() -> None:
        decode_tensor("frame", encode_tensor(old, new), old)

    return timed(there_and_back)[0] - timed(there_and_back)[0]


def first(store: SnapshotStore, weights: Weights, optimizer: Apollo, size: int) -> dict[str, float]:
    """The first snapshot: the pause, the copy, and an anchor."""
    pause, copying = best(lambda: SnapshotCopy(weights, optimizer))
    copied, _ = best(lambda: SnapshotCopy(weights, optimizer).state())
    anchor, _ = best(lambda: store.create(copying, "anchor"), 1)
    return {
        "pause_ms": 1000 * pause,
        # At worst, where each step comes to every parameter before the copy does.
        "worst_pause_ms_per_gib": 1000 * copied / size * 2**30,
        "copy_gb_s": size / copied / 1e9,
        "anchor_gb_s": size / anchor / 1e9,
    }


def one(
    store: SnapshotStore, weights: Weights, optimizer: Apollo, size: int, number: int
) -> dict[str, float]:
    """A snapshot of the weights, its load and its restore, each alone and together."""
    state = SnapshotCopy(weights, optimizer).state()
    anchor = store.list()[0].anchor
    encode, _ = best(lambda: store._anchors.encode(anchor, state, background_threads(size)))
    spread, _ = best(lambda: store._anchors.encode(anchor, state, threads_for(size)))
    create, info = best(lambda: store.create(state, f"after {number}"), 1)
    load, _ = best(lambda: store.load(info.id))
    # The decoded state is the old one afterwards, and is restored in the next round.
    put, _ = best(lambda: restore(state, weights, optimizer))
    both, _ = best(lambda: restore(store.load(info.id), weights, optimizer))
    return {
        "percent": 100 * (info.size_bytes - optimizer.state_size_bytes()) / size,
        "encode_gb_s": size / encode / 1e9,
        "encode_all_threads_gb_s": size / spread / 1e9,
        "create_gb_s": size / create / 1e9,
        "load_gb_s": size / load / 1e9,
        "restore_gb_s": size / put / 1e9,
        "load_and_restore_gb_s": size / both / 1e9,
    }


def undo(weights: Weights, optimizer: Apollo, size: int) -> dict[str, float]:
    """Updates recorded and taken back.

    The first hook writes to fresh memory; `hook` is that of later updates; `hook_at_once` that of
    an update which follows before anything of the one before it was encoded.
    """
    ring = UndoRing(8 * size)
    hooks, encoded, kept = [], [], [0]
    for _ in range(1 + ROUNDS):
        hooks.append(record(ring, weights, optimizer))
        seconds, all_kept = timed(ring.size_bytes)
        encoded.append(seconds)
        kept.append(all_kept)
    at_once = min([record(ring, weights, optimizer) for _ in range(ROUNDS)][1:])
    back, _ = best(lambda: ring.undo(1, weights, optimizer))
    ring.clear()
    ring.stop()
    per_gib = 1000 / size * 2**30
    return {
        "percent_with_moments": 100 * (kept[-1] - kept[-2]) / size,
        "hook_first_ms_per_gib": hooks[0] * per_gib,
        "hook_ms_per_gib": min(hooks[1:]) * per_gib,
        "hook_at_once_ms_per_gib": at_once * per_gib,
        "encode_gb_s": size / min(encoded) / 1e9,
        "undo_gb_s": size / back / 1e9,
    }


def record(ring: UndoRing, weights: Weights, optimizer: Apollo) -> float:
    """Seconds of the hook in one update."""
    ring.begin(weights, optimizer)
    seconds, _ = timed(lambda: [ring.before_write(weight) for weight in weights.values()])
    for weight in weights.values():
        update(weight)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    ring.end(weights)
    return seconds


def main() -> None:
    """Measures and prints; `--write` keeps the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--updates", type=int, default=max(UPDATES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    result = measure(
        options.folder,
        mebibytes=options.mebibytes,
        updates=options.updates,
        device=options.device,
    )
    print(json.dumps(result, indent=2))
    if options.write:
        device = torch.device(options.device)
        write_json(result_path("bench_snapshots", device), origin(device) | {"snapshots": result})


if __name__ == "__main__":
    main()
