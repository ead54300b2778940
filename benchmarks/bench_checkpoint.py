"""Every target of the checkpoints, and a sync beside other ways to save, in one process.

    python -m benchmarks.bench_checkpoint [--shape qwen3-0.6b] [--device cpu] [--folder FOLDER]
    python -m benchmarks.bench_checkpoint --parts snapshots --from RESULT

The second form measures a part of a result that is there, and adds it.

Weights of real shapes with random values; on a GPU they are live there, as vLLM's are. A sync of
everything and its peers run in turn, round after round, on the disk of `--folder`; the median is
reported. Some are not durable when they return: their names say so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from apollo_trainer.checkpoints.directory.state_folder import SyncMethod
from benchmarks import snapshot_costs
from benchmarks.machine import installed, origin, pick_device, result_path, write_json
from benchmarks.saving_peers import PEERS
from benchmarks.shapes import TABLES
from benchmarks.synced_model import SyncedModel

ROUNDS = 5
ONE_PER_CENT = 0.01
OURS = "sync, by exchange"
PARTS = ["syncs", "peers", "snapshots"]


def beside_peers(model: SyncedModel, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of each way; the first round makes files, and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *PEERS)}
    written: dict[str, int] = {}
    for number in range(rounds + 1):
        model.train(model.names)
        for name in seconds:
            # Otherwise whoever flushes pays for what the one before left in the page cache.
            os.sync()
            began = time.perf_counter()
            if name == OURS:
                written[name] = model.sync()[1].bytes_written
            else:
                weights = {n: p.detach() for n, p in model.parameters.items()}
                written[name] = PEERS[name](weights, folder)
            if number:
                seconds[name].append(time.perf_counter() - began)
        print(f"round {number} of {rounds}", flush=True)
    return {name: _row(model, seconds[name], seconds[OURS], written[name]) for name in seconds}


def _row(
    model: SyncedModel, seconds: list[float], ours: list[float], written: int
) -> dict[str, Any]:
    return {
        "seconds_per_gib": statistics.median(seconds) / model.bytes * 2**30,
        "bytes_per_byte": written / model.bytes,
        "times_a_sync": statistics.median(a / b for a, b in zip(seconds, ours, strict=True)),
    }


def syncs(model: SyncedModel, rounds: int) -> dict[str, dict[str, Any]]:
    """Each rung of the ladder, after nothing, a hundredth or everything changed."""
    some = model.some(ONE_PER_CENT)
    return {
        "nothing changed": model.measure([], None, rounds),
        "1 % changed, exchange": model.measure(some, None, rounds),
        "1 % changed, in place": model.measure(some, SyncMethod.IN_PLACE, rounds),
        "all changed, exchange": model.measure(model.names, None, rounds),
        "all changed, rollforward": model.measure(model.names, SyncMethod.ROLLFORWARD, rounds),
        "all changed, in place": model.measure(model.names, SyncMethod.IN_PLACE, rounds),
    }


def targets(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What is to be reached: its name, the bound, and the figure."""
    sync = result["syncs"]

    def ms(case: str) -> float:
        return 1000 * float(sync[case]["seconds_per_gib"])

    whole = sync["all changed, exchange"]
    return [
        ("sync, nothing changed: ms", 5, ms("nothing changed") * result["gib"]),
        ("sync, 1 % changed: ms per GiB of model", 25, ms("1 % changed, exchange")),
        ("sync, all changed: ms per GiB", 1000, ms("all changed, exchange")),
        ("sync, all changed: bytes per byte", 1.0, whole["bytes_written"] / result["bytes"]),
        *snapshot_costs.targets(result["snapshots"]),
    ]


def measure(
    parts: list[str], shape: str, shards: int, rounds: int, folder: Path, device: torch.device
) -> dict[str, Any]:
    """The parts of a result, by their names."""
    shapes, result = TABLES[shape](), dict[str, Any]()
    if {"syncs", "peers"} & set(parts):
        model = SyncedModel(folder / "model", shapes, shards, device)
        result |= {"bytes": model.bytes, "gib": model.bytes / 2**30}
        if "syncs" in parts:
            result["syncs"] = syncs(model, rounds)
        if "peers" in parts:
            result["rows"] = beside_peers(model, folder, rounds)
        del model
        shutil.rmtree(folder)
    if "snapshots" in parts:
        result["snapshots"] = snapshot_costs.measure(shapes, folder, device, rounds)
    return result


def main() -> None:
    """Measures, prints and writes a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(TABLES), default="qwen3-0.6b")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, default=Path.cwd() / "build")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--from", dest="begun", type=Path, help="a result to add to")
    parser.add_argument("--out", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = pick_device(arguments.device)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=arguments.folder))
    result = origin(device) | {"shape": arguments.shape, "rounds": arguments.rounds}
    if arguments.begun:
        result = json.loads(arguments.begun.read_text()) | origin(device)
    result["versions"] |= {n: installed(n) for n in ("safetensors", "transformers")}
    try:
        result |= measure(
            arguments.parts, result["shape"], arguments.shards, arguments.rounds, folder, device
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(result)
    write_json(arguments.out or result_path("bench_checkpoint", device), result)


def show(result: dict[str, Any]) -> None:
    """Prints the figures."""
    print(f"{result['shape']} on {result['machine']['device']}")
    for name, row in result.get("rows", {}).items():
        print(
            f"{name:36} {row['seconds_per_gib']:7.3f} s/GiB  "
            f"{row['bytes_per_byte']:6.3f} of the bytes  {row['times_a_sync']:6.2f} times"
        )
    for name, case in result.get("syncs", {}).items():
        print(
            f"{name:26} {case['method']:12} {1000 * case['seconds_per_gib']:8.1f} ms/GiB "
            f"(slowest {1000 * case['slowest_seconds_per_gib']:.1f}, the first "
            f"{1000 * case['first_seconds_per_gib']:.1f}), {case['bytes_written']:,} bytes written"
        )
    for name, bound, figure in targets(result) if {"syncs", "snapshots"} <= result.keys() else []:
        print(f"{name:50} target {bound:8.1f}   measured {figure:8.2f}")


if __name__ == "__main__":
    main()
