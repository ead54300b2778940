"""Every crash of snapshots and of an export: what exists is whole, what was reported stays."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from apollo_trainer.checkpoints.directory.export import export_directory
from apollo_trainer.checkpoints.snapshots.model_state import ModelState
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from tests.checkpoints.crash_matrix import Counts
from tests.checkpoints.crash_protocols import MODEL, fresh, reader
from tests.checkpoints.crash_recorder import MemoryFiles

ROOT, OUT = Path("/disk/.model.apollo"), Path("/disk/out")
# So that an export has an index.
SHARD_BYTES = 4000


class Enough(BaseException):
    """One bad image is enough."""


@dataclass
class Stored:
    """What may be in a store after a crash, by step count: each snapshot has one of its own.

    Attributes:
        sure: those that were reported.
        perhaps: those that are being written or deleted.
    """

    sure: set[int] = field(default_factory=set)
    perhaps: set[int] = field(default_factory=set)


def state(step: int) -> ModelState:
    """Weights and moments of one step; every second one is far from the one before."""
    made = torch.Generator().manual_seed(step // 2)
    weight = torch.randn(150, generator=made)
    weight[step % 150] += step
    return ModelState({"w": weight}, {"m/w": weight * 2}, {"step_count": step})


@cache
def digest_of(step: int) -> str:
    return state(step).digest("w")


def snapshots(fs: MemoryFiles, stored: Stored) -> Iterator[None]:
    """Three snapshots of two anchors, then deletions; goes on when what is stored is sure."""
    store = SnapshotStore(ROOT, ops=fs)
    for step in range(3):
        stored.perhaps = {step}
        store.create(state(step), f"{step}")
        stored.sure, stored.perhaps = stored.sure | {step}, set()
        yield
    for step in (1, 0):
        stored.sure, stored.perhaps = stored.sure - {step}, {step}
        store.delete(store.id_of(f"{step}"))
        stored.perhaps = set()
        yield


def why_not_whole(image: MemoryFiles, stored: Stored) -> str:
    """What is wrong in a store after a crash; empty where nothing is."""
    store = SnapshotStore(ROOT, ops=image)
    infos = store.list()
    if len(infos) != len(store._folder.ids()):
        return "an entry cannot be read"
    for info in infos:
        loaded = store.load(info.id)
        if loaded.digest("w") != digest_of(info.optimizer_step):
            return f"{info.optimizer_step} is another one"
    found = {info.optimizer_step for info in infos}
    if not stored.sure <= found <= stored.sure | stored.perhaps:
        return f"{found}, not {stored.sure} and perhaps {stored.perhaps}"
    return ""


def enumerate_store_crashes(
    *, images: int, seed: int = 0, without: int | None = None, stop_when_bad: bool = False
) -> Counts:
    """Snapshots and deletions, crashed before every operation and after each."""
    fs, stored = fresh(), Stored()

    def look(image: MemoryFiles, counts: Counts) -> str:
        why = why_not_whole(image, stored)
        if not why and counts.images % 16 == 0:
            SnapshotStore(ROOT, ops=image).create(state(8), "next")
        return why

    def work() -> Iterator[None]:
        yield from snapshots(fs, stored)

    return _enumerate(fs, work, look, images, seed, without, stop_when_bad)


@cache
def exported() -> dict[str, bytes]:
    """An export that nothing disturbed."""
    fs = fresh()
    export_directory(MODEL, OUT, reader(2), shard_bytes=SHARD_BYTES, ops=fs)
    return _content(fs)


def _content(fs: MemoryFiles) -> dict[str, bytes]:
    content = {}
    for name in fs.names(OUT):
        with fs.opened(OUT / name) as file:
            content[name] = fs.pread(file, 1 << 20, 0)
    return content


def enumerate_export_crashes(
    *, images: int, seed: int = 0, without: int | None = None, stop_when_bad: bool = False
) -> Counts:
    """An export, crashed before every operation and after it."""
    fs, returned = fresh(), list[bool]()

    def work() -> Iterator[None]:
        export_directory(MODEL, OUT, reader(2), shard_bytes=SHARD_BYTES, ops=fs)
        returned.append(True)
        yield

    def look(image: MemoryFiles, counts: Counts) -> str:
        if image.found(OUT) is None:
            if returned:
                return "it was reported, and is gone"
            export_directory(MODEL, OUT, reader(2), shard_bytes=SHARD_BYTES, ops=image)
        if _content(image) != exported():
            return "it is there, and not whole"
        left = [name for name in image.names(OUT.parent) if "apollo-new" in name]
        # An empty one may be another process's, which is about to lock it.
        left = [name for name in left if image.names(OUT.parent / name)]
        # A rename that is not on disk yet leaves no second name.
        return f"{left} were left behind" if left and not returned else ""

    return _enumerate(fs, work, look, images, seed, without, stop_when_bad)


def _enumerate(
    fs: MemoryFiles,
    work: Callable[[], Iterator[None]],
    look: Callable[[MemoryFiles, Counts], str],
    images: int,
    seed: int,
    without: int | None,
    stop_when_bad: bool,
) -> Counts:
    counts, rng = Counts(), random.Random(seed)
    fs.without = set() if without is None else {without}

    def crash() -> None:
        # Until that fsync nothing is missing.
        if without is not None and len(fs.flushes) <= without:
            return
        counts.operations += 1
        for _ in range(images):
            counts.images += 1
            try:
                why = look(fs.after_crash(rng), counts)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            if why:
                counts.wrong += 1
                counts.reasons.append(why)
            if why and stop_when_bad:
                raise Enough

    fs.before = crash
    try:
        for _ in work():
            crash()
    except Enough:
        pass
    return counts


def store_flushes() -> list[str]:
    """What each fsync of `snapshots` is of."""
    fs = fresh()
    for _ in snapshots(fs, Stored()):
        pass
    return fs.flushes


def export_flushes() -> list[str]:
    """What each fsync of an export is of."""
    fs = fresh()
    export_directory(MODEL, OUT, reader(2), shard_bytes=SHARD_BYTES, ops=fs)
    return fs.flushes
