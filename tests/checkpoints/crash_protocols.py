"""Ways to bring three shards up to date: ours, and the two that come to mind first."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from apollo_trainer.checkpoints.directory.recovery import recover
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import held, is_untouched, place_of
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from apollo_trainer.checkpoints.disk.digests import raw_bytes
from apollo_trainer.checkpoints.disk.shard_header import build_header
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan, CheckpointTensor
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from tests.checkpoints.crash_recorder import MemoryFiles

MODEL = Path("/disk/model")
SHARDS = ("a.safetensors", "b.safetensors", "c.safetensors")
# Of the first shard every tensor changes, of the second one, of the third none.
CHANGES = {"a0": True, "a1": True, "b0": True, "b1": False, "c0": False}
ELEMENTS = 450


@cache
def weights(generation: int) -> dict[str, torch.Tensor]:
    """float32 [450] of each name; no two generations share a value where they differ."""
    made = {}
    for name, changes in CHANGES.items():
        seed = random.Random(f"{name} {generation if changes else 0}").randrange(1 << 40)
        made[name] = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(seed))
    return made


@cache
def files(generation: int) -> dict[str, bytes]:
    """What the shards are to hold."""
    content = {}
    for shard in SHARDS:
        tensors = {n: t for n, t in weights(generation).items() if n[0] == shard[0]}
        header = build_header(tensors, {"format": "pt"})
        content[shard] = header.raw + b"".join(raw_bytes(tensors[n]).data for n in header.tensors)
    return content


@cache
def reader(generation: int) -> CheckpointReader:
    """Of the live weights at a generation; nobody may write to them."""
    return live_model(generation)


def live_model(generation: int) -> CheckpointReader:
    """The same, with memory of its own."""
    tensors = tuple(CheckpointTensor(n, n, (ELEMENTS,), (1,), 0) for n in CHANGES)
    plan = CheckpointPlan(dict.fromkeys(CHANGES, (ELEMENTS,)), {}, tensors)
    return CheckpointReader(
        plan, {n: torch.nn.Parameter(t.clone()) for n, t in weights(generation).items()}
    )


def put(fs: MemoryFiles, path: Path, data: bytes) -> None:
    """A new file."""
    file = fs.create(path, 0o644)
    fs.write_all(file, memoryview(data), 0)
    fs.close(file)


def fresh() -> MemoryFiles:
    """A directory of generation 0 that was never synced, all of it on disk."""
    fs = MemoryFiles()
    fs.mkdir(MODEL.parent)
    fs.mkdir(MODEL, 0o755)
    for name, data in {**files(0), "config.json": b"{}", "notes.txt": b"mine"}.items():
        put(fs, MODEL / name, data)
    fs.settle()
    return fs


@dataclass(frozen=True)
class Protocol:
    """A way to sync: `sync(fs, generation)`, `recover(fs)`, and what must hold after it.

    Attributes:
        keeps: the directory before, whole.
    """

    name: str
    sync: Callable[[MemoryFiles, int], None]
    recover: Callable[[MemoryFiles], None]
    ours: bool = True
    keeps: bool = False


def ours(name: str, method: SyncMethod | None, *, spares: bool = False) -> Protocol:
    """One rung of the ladder."""
    # A process knows what it spared; the one that comes after a crash has another file system.
    of_process = WeakKeyDictionary[MemoryFiles, Spare]()

    def sync(fs: MemoryFiles, generation: int) -> None:
        spare = of_process.setdefault(fs, Spare()) if spares else None
        options = SyncOptions(method=method, ops=fs, spare=spare)
        outcome = sync_directory(
            MODEL,
            reader(generation),
            versions=lambda tensor: generation + 1,
            options=options,
        )
        assert outcome.method == (method or SyncMethod.EXCHANGE)

    def settle(fs: MemoryFiles) -> None:
        place = place_of(MODEL, fs)
        with held(place):
            manifest = recover(place)
            before = {f"before-{number}" for number in place.left_before()}
            left = set(fs.names(place.state)) - {"LOCK", "manifest.json"} - before
            if manifest and not is_untouched(place, manifest):
                raise AssertionError("the directory is not of the manifest's generation")
            if left:
                raise AssertionError(f"{left} were left behind")

    return Protocol(name, sync, settle, keeps=spares)


def _in_place(fs: MemoryFiles, generation: int) -> None:
    for name, data in files(generation).items():
        file = fs.open(MODEL / name, write=True)
        fs.write_all(file, memoryview(data), 0)
        fs.fsync(file)
        fs.close(file)


def _rename_each(fs: MemoryFiles, generation: int) -> None:
    for name, data in files(generation).items():
        new = MODEL / f".{name}.new"
        fs.remove(new)
        file = fs.create(new)
        fs.write_all(file, memoryview(data), 0)
        fs.fsync(file)
        fs.close(file)
        fs.rename(new, MODEL / name)
    fs.sync_folder(MODEL)


OURS = (
    ours("exchange", None),
    ours("exchange, over spare shards", None, spares=True),
    ours("rollforward", SyncMethod.ROLLFORWARD),
    ours("in_place", SyncMethod.IN_PLACE),
)
NAIVE = (
    Protocol("written in place, no journal", _in_place, lambda fs: None, ours=False),
    Protocol("a rename for each shard", _rename_each, lambda fs: None, ours=False),
)
