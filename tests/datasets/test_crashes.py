"""A power failure at any operation: what is listed is whole, what was reported stays."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from apollo_trainer.datasets import DatasetStore
from tests.checkpoints.crash_recorder import MemoryFiles
from tests.datasets.conftest import bring, sample

STATE = Path("/disk/state")
IMAGES = 8


def open_store(files: MemoryFiles) -> DatasetStore:
    return DatasetStore(STATE / "datasets", limit_bytes=2**20, max_samples=1000, ops=files)


@dataclass
class Kept:
    """What may be there, by the numbers of samples: each dataset has one of its own."""

    sure: set[int] = field(default_factory=set)
    perhaps: set[int] = field(default_factory=set)


def disk() -> MemoryFiles:
    """A disk with a state folder that is new."""
    files = MemoryFiles()
    files.mkdir(STATE.parent)
    files.mkdir(STATE)
    files.settle()
    return files


def work(files: MemoryFiles, kept: Kept) -> None:
    """Brings three datasets, one of them again, and deletes one."""
    store, made = open_store(files), {}
    for count in (40, 1, 80):
        kept.perhaps = {count}
        samples = [sample(number) for number in range(count)]
        made[count] = bring(store, samples[:30], samples[30:])
        kept.sure, kept.perhaps = kept.sure | {count}, set()
    bring(store, [sample(number) for number in range(40)], name="again")
    kept.sure, kept.perhaps = kept.sure - {1}, {1}
    store.delete(made[1].dataset_id)
    kept.perhaps = set()


def wrong_images(without: int | None = None) -> tuple[int, list[str]]:
    """How many images were looked at, and what was wrong in some of them.

    Args:
        without: number of the fsync that does nothing.
    """
    files, kept, rng, wrong, looked = disk(), Kept(), random.Random(3), list[str](), 0
    files.without = set() if without is None else {without}

    def crash() -> None:
        nonlocal looked
        for _ in range(IMAGES):
            looked += 1
            image = files.after_crash(rng)
            store = open_store(image)
            found = {about.samples for about in store.all()}
            if not kept.sure <= found <= kept.sure | kept.perhaps:
                wrong.append(f"{found}, not {kept.sure} and perhaps {kept.perhaps}")
            for about in store.all():
                if list(store.samples(about.dataset_id)) != [
                    sample(number) for number in range(about.samples)
                ]:
                    wrong.append(f"the samples of {about.samples}")
            if len(image.names(STATE / "datasets")) != len(found):
                wrong.append(f"more files than {found}")

    files.before = crash
    work(files, kept)
    crash()
    return looked, wrong


def flushes() -> list[str]:
    files = disk()
    work(files, Kept())
    return files.flushes


FLUSHES = flushes()


def test_no_power_failure_loses_what_was_reported_or_lists_what_is_not_whole() -> None:
    looked, wrong = wrong_images()
    assert wrong == [] and looked > 200


@pytest.mark.parametrize("before", ["state", "tmp", "datasets"])
def test_the_flush_of_each_kind_is_needed(before: str) -> None:
    names = [name.partition("-")[0] for name in FLUSHES]
    # Of a file the second one is: the first only leaves little to wait for within the lock.
    assert wrong_images(names.index(before) + (before == "tmp"))[1]
