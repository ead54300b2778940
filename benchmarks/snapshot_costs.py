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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apollo_trainer.checkpoints.disk.digests import digest
from apollo_trainer.checkpoints.disk.threads import background_threads, threads_for
from apollo_trainer.checkpoints.host_memory import HostBuffers
from apollo_trainer.checkpoints.snapshots.copy_on_write import SnapshotCopy
from apollo_trainer.checkpoints.snapshots.delta_file import decode_tensor, encode_tensor
from apollo_trainer.checkpoints.snapshots.frames import FRAME
from apollo_trainer.checkpoints.snapshots.model_state import ModelState
from apollo_trainer.checkpoints.snapshots.restoring import restore
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots.undo_ring import UndoRing
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


def best(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Seconds of the fastest round, and the last result."""
    seconds, result = [], None
    for _ in range(rounds):
        # The memory of the last result is not needed again for this one.
        result = None
        each, result = timed(work)
        seconds.append(each)
    return min(seconds), result


@dataclass
class Measured:
    """The model that is measured, and what the server keeps beside it."""

    weights: Weights
    optimizer: Apollo
    store: SnapshotStore
    memory: HostBuffers
    rounds: int
    size: int

    def copy(self) -> SnapshotCopy:
        """A copy that is yet to be made, in memory that is kept."""
        return SnapshotCopy(self.weights, self.optimizer, {}, self.memory)

    def gb_s(self, seconds: float) -> float:
        """Bytes of the weights by these seconds."""
        return self.size / seconds / 1e9

    def ms_per_gib(self, seconds: float) -> float:
        """These seconds by the weights' size."""
        return 1000 * seconds / self.size * 2**30


def measure(
    shapes: Shapes,
    folder: Path,
    device: torch.device,
    rounds: int = ROUNDS,
    updates: int = max(UPDATES),
) -> dict[str, Any]:
    """All figures: sizes in percent of the weights, GB/s, ms, ms per GiB of weights.

    Args:
        folder: is made and removed; its disk is what anchors and snapshots are written to.
        rounds: of each, the fastest of which counts.
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
    memory = HostBuffers(device.type == "cuda")
    model = Measured(weights, optimizer, SnapshotStore(folder), memory, rounds, size)
    try:
        result |= told("first", lambda: first(model))
        for number in range(1, updates + 1):
            update(weights)
            if number in UPDATES:
                row = f"after_{number}"
                result[row] = told(row, lambda number=number: one(model, number))
        result["undo"] = told("undo", lambda: undo(model))
    finally:
        shutil.rmtree(folder)
    return result


def told(what: str, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures of a part, printed as they come: a large model takes minutes."""
    figures = work()
    print(what, {name: round(figure, 3) for name, figure in figures.items()}, flush=True)
    return figures


def compile_seconds() -> float:
    """What the first frame of a process takes longer than the second."""
    old = torch.zeros(FRAME).bfloat16()
    new = old + 1

    def there_and_back() -> None:
        decode_tensor("frame", encode_tensor(old, new), old)

    return timed(there_and_back)[0] - timed(there_and_back)[0]


def first(model: Measured) -> dict[str, float]:
    """The first snapshot, into fresh memory, and those after it; an anchor."""
    pause, _ = best(model.copy, model.rounds)
    fresh, copying = timed(lambda: _copied(model))
    anchor, _ = best(lambda: model.store.create(copying, "anchor"), 1)
    copying.give_back()

    def again() -> None:
        _copied(model).give_back()

    copied, _ = best(again, model.rounds)
    return {
        "pause_ms": 1000 * pause,
        # At worst, where each step comes to every parameter before the copy does.
        "first_worst_pause_ms_per_gib": model.ms_per_gib(fresh),
        "worst_pause_ms_per_gib": model.ms_per_gib(copied),
        "copy_gb_s": model.gb_s(copied),
        "anchor_gb_s": model.gb_s(anchor),
    }


def _copied(model: Measured) -> SnapshotCopy:
    copying = model.copy()
    for weight in model.weights.values():
        copying.before_write(weight)
    copying.state()
    return copying


def one(model: Measured, number: int) -> dict[str, float]:
    """A snapshot of the weights, its load and its restore, each alone and together."""
    store, anchors, size, rounds = model.store, model.store.anchors, model.size, model.rounds
    copying, anchor = model.copy(), store.list()[0].anchor
    state = copying.state()
    encode, _ = best(lambda: anchors.encode(anchor, state, background_threads(size)), rounds)
    spread, _ = best(lambda: anchors.encode(anchor, state, threads_for(size)), rounds)
    create, info = best(lambda: store.create(state, f"after {number}"), 1)
    copying.give_back()

    def loaded() -> ModelState:
        return store.load(info.id, model.memory.take)

    def given(state: ModelState) -> None:
        model.memory.give(*state.parameters.values(), *state.moments.values())

    load, _ = best(lambda: given(loaded()), rounds)
    state = loaded()
    # The decoded state is the old one afterwards, and is restored in the next round.
    put, _ = best(lambda: restore(state, model.weights, model.optimizer), rounds)
    given(state)
    both, _ = best(lambda: given(restore(loaded(), model.weights, model.optimizer)), rounds)
    return {
        "percent": 100 * (info.size_bytes - model.optimizer.state_size_bytes()) / size,
        "encode_gb_s": model.gb_s(encode),
        "encode_all_threads_gb_s": model.gb_s(spread),
        "create_gb_s": model.gb_s(create),
        "load_gb_s": model.gb_s(load),
        "restore_gb_s": model.gb_s(put),
        "load_and_restore_gb_s": model.gb_s(both),
    }


def undo(model: Measured) -> dict[str, float]:
    """Updates recorded and taken back.

    The first hook writes to fresh memory; `hook` is that of later updates; `hook_at_once` that of
    an update which follows before anything of the one before it was encoded.
    """
    ring = UndoRing(8 * model.size)
    hooks, encoded, kept = [], [], [0]
    for _ in range(1 + model.rounds):
        hooks.append(record(ring, model))
        seconds, all_kept = timed(ring.size_bytes)
        encoded.append(seconds)
        kept.append(all_kept)
    at_once = min([record(ring, model) for _ in range(max(2, model.rounds))][1:])
    back, _ = best(lambda: ring.undo(1, model.weights, model.optimizer), model.rounds)
    ring.clear()
    ring.stop()
    return {
        "percent_with_moments": 100 * (kept[-1] - kept[-2]) / model.size,
        "hook_first_ms_per_gib": model.ms_per_gib(hooks[0]),
        "hook_ms_per_gib": model.ms_per_gib(min(hooks[1:])),
        "hook_at_once_ms_per_gib": model.ms_per_gib(at_once),
        "encode_gb_s": model.gb_s(min(encoded)),
        "undo_gb_s": model.gb_s(back),
    }


def record(ring: UndoRing, model: Measured) -> float:
    """Seconds of the hook in one update."""
    ring.begin(model.weights, model.optimizer)
    seconds, _ = timed(lambda: [ring.before_write(weight) for weight in model.weights.values()])
    update(model.weights)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    ring.end(model.weights)
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
