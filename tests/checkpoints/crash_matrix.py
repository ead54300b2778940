"""Every crash of a sync: at each operation, with each of many images, recovered and looked at."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from apollo_trainer.checkpoints.state_folder import place_of, read_manifest
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
    stop_when_bad: bool = False,
) -> Counts:
    """Two syncs in a row, crashed before every operation of theirs, and after each.

    Args:
        images: of each crash.
        without: number of the fsync that does nothing.
        first: the directory was never synced before; otherwise it was once.
        stop_when_bad: one bad image is enough.
    """
    counts, rng = Counts(), random.Random(seed)
    fs, begin = fresh(), 1
    if not first:
        protocol.sync(fs, 1)
        fs.settle()
        begin = 2
    fs.without = set() if without is None else {without}
    allowed = {begin - 1}

    class Enough(BaseException):
        pass

    def crash() -> None:
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
    if not first:
        protocol.sync(fs, 1)
        fs.settle()
    protocol.sync(fs, 1 if first else 2)
    return fs.flushes


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
    found = loaded(image)
    if found not in allowed:
        counts.wrong += 1
        counts.reasons.append(f"the directory is of {found}, not of {allowed}")
    elif protocol.ours and (reason := _disagreement(image, found)):
        counts.wrong += 1
        counts.reasons.append(reason)
    elif protocol.ours and counts.images % 16 == 0:
        protocol.sync(image, 9)
        assert loaded(image) == 9


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


def loaded(fs: MemoryFiles) -> int | str | None:
    """The generation that a loader of the directory gets: "mix", or None where it fails."""
    names = fs.names(MODEL) if fs.found(MODEL) else []
    if "config.json" not in names or "notes.txt" not in names:
        return None
    content = {}
    for shard in files(0):
        if shard not in names:
            return None
        with fs.opened(MODEL / shard) as file:
            content[shard] = fs.pread(file, 1 << 20, 0)
    return next((g for g in (0, 1, 2, 3, 9) if files(g) == content), "mix")


def _disagreement(fs: MemoryFiles, found: int | str | None) -> str:
    """Why the manifest is not of the directory's generation; empty where it is."""
    manifest = read_manifest(place_of(MODEL, fs))
    if manifest is None:
        return "" if found == 0 else "a synced directory has no manifest"
    same = manifest.generation == found
    return "" if same else f"manifest {manifest.generation}, directory {found}"
