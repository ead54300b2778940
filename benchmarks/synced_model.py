"""A model directory of real shapes, the live weights that belong to it, and syncs of the two."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import SyncMethod
from apollo_trainer.checkpoints.directory.survey import SyncOutcome
from apollo_trainer.checkpoints.directory.sync import SyncOptions, sync_directory
from apollo_trainer.checkpoints.disk.durable import flush_file
from apollo_trainer.checkpoints.disk.tensor_file import write_tensors
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan, CheckpointTensor
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from benchmarks.shapes import Shapes


class SyncedModel:
    """bfloat16 weights N(0, 0.02) on a device, and their directory, which is on disk."""

    def __init__(self, folder: Path, shapes: Shapes, shards: int, device: torch.device):
        self.parameters = {
            name: torch.nn.Parameter(
                torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02),
                requires_grad=False,
            )
            for name, shape in shapes.items()
        }
        self.names, self.folder, self.device = list(shapes), folder, device
        self.versions, self.spare = dict.fromkeys(shapes, 1), Spare()
        planned = tuple(
            CheckpointTensor(n, n, shape, _strides(shape), 0) for n, shape in shapes.items()
        )
        self.reader = CheckpointReader(CheckpointPlan(dict(shapes), {}, planned), self.parameters)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        for number, names in enumerate(self._parts(shards)):
            part = {name: self.parameters[name].detach().cpu() for name in names}
            path = folder / f"model-{number:05d}.safetensors"
            write_tensors(part, path, {"format": "pt"})
            flush_file(path)

    def _parts(self, shards: int) -> list[list[str]]:
        """Names of about equal bytes, in the model's order."""
        parts, done = [list[str]() for _ in range(shards)], 0
        for name, parameter in self.parameters.items():
            parts[min(shards - 1, done * shards // self.bytes)].append(name)
            done += parameter.nbytes
        return [names for names in parts if names]

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(p.nbytes for p in self.parameters.values())

    def some(self, part: float) -> list[str]:
        """Tensors that are together about this part of the bytes: neighbours, from the middle."""
        names, taken = list[str](), 0
        for name in self.names[len(self.names) // 2 :]:
            if taken + self.parameters[name].nbytes <= part * self.bytes:
                names.append(name)
                taken += self.parameters[name].nbytes
        return names

    def train(self, names: list[str]) -> None:
        """Flips a bit of every element."""
        for name in names:
            self.parameters[name].view(torch.int16).bitwise_xor_(1)
            self.versions[name] += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sync(self, method: SyncMethod | None = None) -> tuple[float, SyncOutcome]:
        """Seconds of a sync, as the training server calls it, and what it did."""
        began = time.perf_counter()
        outcome = sync_directory(
            self.folder,
            self.reader,
            versions=self.versions.__getitem__,
            options=SyncOptions(method=method, spare=self.spare),
        )
        return time.perf_counter() - began, outcome

    def measure(self, names: list[str], method: SyncMethod | None, rounds: int) -> dict[str, Any]:
        """Of some syncs after these tensors were written to; two before them are not counted.

        They write new files, where later ones write over those of three syncs before.
        """
        seconds, outcome = list[float](), SyncOutcome()
        for _ in range(rounds + 2):
            self.train(names)
            took, outcome = self.sync(method)
            seconds.append(took)
        gib = self.bytes / 2**30
        return {
            "method": str(outcome.method),
            "bytes_of_changed_tensors": sum(self.parameters[name].nbytes for name in names),
            "bytes_written": outcome.bytes_written,
            "bytes_compared": outcome.bytes_compared,
            "first_seconds_per_gib": seconds[0] / gib,
            "seconds_per_gib": statistics.median(seconds[2:]) / gib,
            "slowest_seconds_per_gib": max(seconds[2:]) / gib,
        }


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
