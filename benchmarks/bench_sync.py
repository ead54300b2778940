"""What a sync costs: nothing changed, 1 % of the tensors, all of them; seconds and bytes.

    python -m benchmarks.bench_sync [--gib 1] [--shards 4] [--folder FOLDER]

A synthetic bfloat16 model of 100 equal tensors. Every case is taken several times; the median is
reported. The disk is that of `--folder`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from apollo_trainer.checkpoints.durable_write import flush_file
from apollo_trainer.checkpoints.state_folder import SyncMethod
from apollo_trainer.checkpoints.sync import SyncOptions, sync_directory
from apollo_trainer.checkpoints.tensor_file import write_tensors
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan, CheckpointTensor
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from benchmarks.machine import origin, result_path, write_json

TENSORS = 100
REPEATS = 5
COLUMNS = 1024


class SyncedModel:
    """A model directory, and the live weights that belong to it."""

    def __init__(self, folder: Path, bytes_: int, shards: int):
        rows = bytes_ // TENSORS // COLUMNS // 2
        shape, stride = (rows, COLUMNS), (COLUMNS, 1)
        names = [f"layers.{n:02d}.weight" for n in range(TENSORS)]
        # One block for all, as an engine keeps them.
        block = torch.empty(TENSORS, *shape, dtype=torch.bfloat16).normal_(0, 0.02)
        self.parameters = {
            n: torch.nn.Parameter(v, requires_grad=False) for n, v in zip(names, block, strict=True)
        }
        self.names, self.folder = names, folder
        self.versions = dict.fromkeys(names, 1)
        planned = tuple(CheckpointTensor(n, n, shape, stride, 0) for n in names)
        plan = CheckpointPlan(dict.fromkeys(names, shape), {}, planned)
        self.reader = CheckpointReader(plan, self.parameters)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        each = -(-TENSORS // shards)
        for at in range(0, TENSORS, each):
            part = {n: self.parameters[n] for n in names[at : at + each]}
            path = folder / f"model-{at // each:05d}.safetensors"
            write_tensors(part, path, {"format": "pt"})
            flush_file(path)

    @property
    def gib(self) -> float:
        """Size of the weights."""
        return sum(p.nbytes for p in self.parameters.values()) / 2**30

    def train(self, names: list[str]) -> None:
        """Flips a bit of every element."""
        for name in names:
            self.parameters[name].view(torch.int16).bitwise_xor_(1)
            self.versions[name] += 1

    def sync(self, method: SyncMethod | None = None) -> tuple[float, Any]:
        """Seconds of a sync, and what it did."""
        began = time.perf_counter()
        outcome = sync_directory(
            self.folder,
            self.reader,
            versions=self.versions.__getitem__,
            options=SyncOptions(method=method),
        )
        return time.perf_counter() - began, outcome


def measure(model: SyncedModel, names: list[str], method: SyncMethod | None) -> dict[str, Any]:
    """Median of some syncs after these tensors were written to."""
    seconds, outcome = list[float](), None
    for _ in range(REPEATS):
        model.train(names)
        took, outcome = model.sync(method)
        seconds.append(took)
    assert outcome is not None
    return {
        "method": str(outcome.method),
        "tensors": len(names),
        "seconds_per_gib": statistics.median(seconds) / model.gib,
        "slowest_seconds_per_gib": max(seconds) / model.gib,
        "bytes_written": outcome.bytes_written,
        "bytes_compared": outcome.bytes_compared,
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
    folder = Path(tempfile.mkdtemp(prefix="bench-sync-", dir=arguments.folder))
    try:
        model = SyncedModel(folder / "model", int(arguments.gib * 2**30), arguments.shards)
        first = model.sync()[0] / model.gib
        cases = {
            "unchanged": measure(model, [], None),
            "one per cent, exchange": measure(model, model.names[:1], None),
            "one per cent, in place": measure(model, model.names[:1], SyncMethod.IN_PLACE),
            "all, exchange": measure(model, model.names, None),
            "all, rollforward": measure(model, model.names, SyncMethod.ROLLFORWARD),
            "all, in place": measure(model, model.names, SyncMethod.IN_PLACE),
        }
    finally:
        shutil.rmtree(folder)
    for name, case in cases.items():
        print(
            f"{name:24} {case['method']:12} {1000 * case['seconds_per_gib']:8.1f} ms/GiB "
            f"(slowest {1000 * case['slowest_seconds_per_gib']:.1f}), "
            f"{case['bytes_written']:,} bytes written"
        )
    device = torch.device("cpu")
    result = {"gib": model.gib, "shards": arguments.shards, "first_seconds_per_gib": first}
    write_json(result_path("bench_sync", device), {**origin(device), **result, "cases": cases})


if __name__ == "__main__":
    main()
