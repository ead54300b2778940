"""Snapshots, undo and restore of a model of real shapes: sizes, and how fast each part is.

Weights are bfloat16, N(0, 0.02); an update adds N(0, 1e-5) to all, rounded stochastically, as in
the design's table. Files are warm, and the loops compiled: how long that takes is in the result.
GB/s are bytes of the weights.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apollo_trainer.checkpoints.delta_file import decode_tensor, encode_tensor
from apollo_trainer.checkpoints.digest import digest
from apollo_trainer.checkpoints.frames import FRAME
from apollo_trainer.checkpoints.restore import restore
from apollo_trainer.checkpoints.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots import SnapshotCopy
from apollo_trainer.checkpoints.spread import background_threads, threads_for
from apollo_trainer.checkpoints.undo_ring import UndoRing
from apollo_trainer.optim import Apollo
from benchmarks.shapes import Shapes

UPDATES, SIZE = (1, 10, 100), 1e-5
# Draws of one update; more elements take them again, far outside of what a frame holds.
POOL = 2**22
ROUNDS = 3

Weights = dict[str, torch.nn.Parameter]


def update(weights: Weights) -> None:
    """One dense update, rounded stochastically, in place."""
    device = next(iter(weights.values())).device
    normal = torch.randn(POOL, device=device)
    noise = torch.randint(0, 2**16, (POOL,), dtype=torch.int32, device=device)
    for weight in weights.values():
        for part in weight.data.view(-1).split(POOL):
            exact = part.float().add_(normal[: part.numel()], alpha=SIZE)
            bits = exact.view(torch.int32).add_(noise[: part.numel()]).bitwise_right_shift_(16)
            part.copy_(bits.to(torch.int16).view(torch.bfloat16))


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
    shapes: Shapes, folder: Path, device: torch.device, updates: int = max(UPDATES)
) -> dict[str, Any]:
    """All figures: sizes in percent of the weights, GB/s, ms, ms per GiB of weights.

    Args:
        folder: is made and removed; its disk is what anchors and snapshots are written to.
        updates: sizes are measured after 1, 10 and 100 of them, as far as this goes.
    """
    torch.manual_seed(0)
    weights = {
        name: torch.nn.Parameter(
            torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        )
        for name, shape in shapes.items()
    }
    optimizer = Apollo(weights.items(), rank=64)
    size = sum(p.nbytes for p in weights.values())
    result: dict[str, Any] = {
        "bytes": size,
        "moments": optimizer.state_size_bytes() / size,
        "digest": digest(torch.zeros(1)).partition(":")[0],
        "device": str(device),
        "processors": os.cpu_count(),
        "threads": threads_for(size),
        "background_threads": background_threads(size),
        "compile_s": compile_seconds(),
    }
    store = SnapshotStore(folder)
    try:
        result |= first(store, weights, optimizer, size)
        for number in range(1, updates + 1):
            update(weights)
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
    update(weights)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    ring.end(weights)
    return seconds


def targets(figures: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What is to be reached: its name, the bound, and the figure."""
    bounds = {1: 11.0, 10: 20.0, 100: 30.0}
    measured = {n: figures[f"after_{n}"] for n in UPDATES if f"after_{n}" in figures}
    sizes = [
        (f"snapshot after {n} updates: % of the bytes", bounds[n], each["percent"])
        for n, each in measured.items()
    ]
    slowest = min(each["load_and_restore_gb_s"] for each in measured.values())
    return [
        *sizes,
        ("snapshot, pause: ms", 0, figures["pause_ms"]),
        ("snapshot, worst pause: ms per GiB", 70, figures["worst_pause_ms_per_gib"]),
        ("undo, pause of an update: ms per GiB", 70, figures["undo"]["hook_ms_per_gib"]),
        ("load and restore, at least: GB/s", 5, slowest),
        ("restore of a decoded one, at least: GB/s", 5, figures["after_1"]["restore_gb_s"]),
    ]
