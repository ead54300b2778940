"""Every crash of a sync: at each operation, with each of many images, recovered and looked at."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from apollo_trainer.checkpoints.directory.state_folder import place_of, read_manifest
from tests.checkpoints.crash_protocols import MODEL, Protocol, files, fresh
from tests.checkpoints.crash_recorder import MemoryFiles, PowerFailure

# Crashes of one recovery.
MOST_CRASHES = 2


@dataclass
class Counts:
    """Crash images of a protocol, and how many of them were bad.

    Attributes:
        wrong: after recovery not wholly of one allowed generation, or refused.
        mixed: before it, for a loader that knows nothing of recovery.
        reasons: what was wrong, a few.
    """

    operations: int = 0
    images: int = 0
    wrong: int = 0
    mixed: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """Whether anything was wrong, also for the unaware."""
        return bool(self.wrong or self.mixed)


def enumerate_crashes(
    protocol: Protocol,
    *,
    images: int,
    seed: int = 0,
    without: int | None = None,
    first: bool = False,
    clones: bool = False,
    stop_when_bad: bool = False,
) -> Counts:
    """Two syncs in a row, crashed before every operation of theirs, and after each.

    Args:
        images: of each crash.
        without: number of the fsync that does nothing.
        clones: the file system shares blocks between files.
        first: the directory was never synced before; otherwise it was.
        stop_when_bad: one bad image is enough.
    """
    counts, rng = Counts(), random.Random(seed)
    fs, begin = fresh(), 1
    fs.clones = clones
    if not first:
        begin = _synced_before(protocol, fs) + 1
    fs.without = set() if without is None else {without}
    allowed = {begin - 1}

    class Enough(BaseException):
        pass

    def crash() -> None:
        # Until then all is as with it.
        if without is not None and len(fs.flushes) <= without:
            return
        counts.operations += 1
        for _ in range(images):
            _look(protocol, fs.after_crash(rng), allowed, rng, counts)
            if stop_when_bad and counts.bad:
                raise Enough

    try:
        for generation in (begin, begin + 1):
            allowed |= {generation}
            fs.before = crash
            protocol.sync(fs, generation)
            allowed -= {generation - 1}
            crash()
    except Enough:
        pass
    return counts


def flushes(protocol: Protocol, first: bool = False) -> list[str]:
    """What each fsync of one sync is of."""
    fs = fresh()
    protocol.sync(fs, 1 if first else _synced_before(protocol, fs) + 1)
    return fs.flushes


def _synced_before(protocol: Protocol, fs: MemoryFiles) -> int:
    """Syncs once, or as often as it takes for the next one to find spare shards."""
    last = 2 if protocol.keeps else 1
    for generation in range(1, last + 1):
        protocol.sync(fs, generation)
    fs.settle()
    return last


def _look(
    protocol: Protocol, image: MemoryFiles, allowed: set[int], rng: random.Random, counts: Counts
) -> None:
    counts.images += 1
    seen = loaded(image)
    # What an unaware loader refuses in the middle of a sync it must load once that has returned.
    if seen not in allowed and not (seen is None and len(allowed) > 1):
        counts.mixed += 1
    try:
        image = _recovered(protocol, image, rng)
    except Exception as error:
        counts.wrong += 1
        counts.reasons.append(f"{type(error).__name__}: {error}")
        return
    if reason := _why_wrong(protocol, image, allowed, counts.images):
        counts.wrong += 1
        counts.reasons.append(reason)


def _why_wrong(protocol: Protocol, image: MemoryFiles, allowed: set[int], number: int) -> str:
    """What is wrong after the recovery; empty where nothing is."""
    found = loaded(image)
    if found not in allowed:
        return f"the directory is of {found}, not of {allowed}"
    if not protocol.ours:
        return ""
    reason = _disagreement(image, found, protocol.keeps)
    return reason or (_next_sync_fails(protocol, image) if number % 16 == 0 else "")


def _next_sync_fails(protocol: Protocol, image: MemoryFiles) -> str:
    """Why the next sync does not bring the directory up to date; empty where it does."""
    try:
        protocol.sync(image, 9)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = loaded(image)
    return "" if found == 9 else f"the directory is of {found} after the next sync"


def _recovered(protocol: Protocol, image: MemoryFiles, rng: random.Random) -> MemoryFiles:
    for _ in range(MOST_CRASHES):
        if rng.random() < 0.5:
            break
        image.before = _off_after(rng.randrange(25))
        try:
            protocol.recover(image)
        except PowerFailure:
            image = image.after_crash(rng)
    image.before = lambda: None
    protocol.recover(image)
    return image


def _off_after(operations: int) -> Callable[[], None]:
    left: Iterator[int] = iter(range(operations))

    def before() -> None:
        if next(left, None) is None:
            raise PowerFailure

    return before


def loaded(fs: MemoryFiles, folder: Path = MODEL) -> int | str | None:
    """The generation that a loader of a directory gets: "mix", or None where it fails."""
    names = fs.names(folder) if fs.found(folder) else []
    if "config.json" not in names or "notes.txt" not in names:
        return None
    content = {}
    for shard in files(0):
        if shard not in names:
            return None
        with fs.opened(folder / shard) as file:
            content[shard] = fs.pread(file, 1 << 20, 0)
    return next((g for g in (0, 1, 2, 3, 4, 9) if files(g) == content), "mix")


def _disagreement(fs: MemoryFiles, found: int | str | None, keeps: bool) -> str:
    """Why the manifest is not of the directory's generation, or the one before it is not whole."""
    place = place_of(MODEL, fs)
    for number in place.left_before()[-1:]:
        # What is not kept may have been crashed as it was removed; that does not load.
        if loaded(fs, place.before(number)) not in ({number} if keeps else {number, None}):
            return f"the directory of generation {number} is not whole"
    manifest = read_manifest(place)
    if manifest is None:
        return "" if found == 0 else "a synced directory has no manifest"
    same = manifest.generation == found
    return "" if same else f"manifest {manifest.generation}, directory {found}"
