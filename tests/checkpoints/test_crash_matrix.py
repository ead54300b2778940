"""No crash leaves a directory of two generations, and every fsync is one that is needed for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from apollo_trainer.checkpoints.directory.verify import verify_directory
from tests.checkpoints.crash_matrix import Counts, enumerate_crashes, flushes, loaded
from tests.checkpoints.crash_protocols import MODEL, NAIVE, OURS, Protocol, fresh, reader
from tests.checkpoints.crash_store import (
    enumerate_export_crashes,
    enumerate_store_crashes,
    export_flushes,
    store_flushes,
)

IMAGES = 8
MORE_IMAGES = pytest.mark.parametrize("images", [IMAGES, pytest.param(24, marks=pytest.mark.long)])
SOAK_IMAGES = int(os.environ.get("SOAK_IMAGES", "600"))


# The default's; those of the other protocols are for `make test-all`.
FIRST = [OURS[0], *(pytest.param(protocol, marks=pytest.mark.long) for protocol in OURS[1:])]


def by_name(protocol: Protocol) -> str:
    return protocol.name


@MORE_IMAGES
@pytest.mark.parametrize("first", [False, True], ids=["synced before", "never synced"])
@pytest.mark.parametrize("protocol", OURS, ids=by_name)
def test_no_crash_leaves_anything_but_one_generation(
    protocol: Protocol, first: bool, images: int
) -> None:
    counts = enumerate_crashes(protocol, images=images, first=first, seed=1)
    assert counts.images > 400
    assert counts.wrong == 0, counts.reasons[:3]
    if protocol.name.startswith("exchange"):
        assert counts.mixed == 0


@MORE_IMAGES
@pytest.mark.parametrize("protocol", OURS[:3], ids=by_name)
def test_shards_that_share_their_unchanged_blocks_are_as_safe(
    protocol: Protocol, images: int
) -> None:
    counts = enumerate_crashes(protocol, images=images, clones=True, seed=6)
    assert (counts.wrong, counts.reasons[:3]) == (0, [])
    fs = fresh()
    fs.clones = True
    for generation in (1, 2):
        protocol.sync(fs, generation)
    assert loaded(fs) == 2
    assert verify_directory(MODEL, reader(2), full=True, ops=fs).differences == []


@pytest.mark.parametrize("protocol", FIRST, ids=by_name)
def test_every_fsync_that_is_taken_out_is_missed(protocol: Protocol) -> None:
    names = flushes(protocol)
    missed = {
        f"{number} {name}": enumerate_crashes(
            protocol, images=60, without=number, seed=2, stop_when_bad=True
        ).bad
        for number, name in enumerate(names)
    }
    assert len(names) >= 6
    assert all(missed.values()), [name for name, bad in missed.items() if not bad]


@pytest.mark.parametrize("protocol", OURS, ids=by_name)
def test_the_fsync_of_a_new_state_folder_is_missed(protocol: Protocol) -> None:
    assert flushes(protocol, first=True)[0] == "disk"
    counts = enumerate_crashes(
        protocol, images=60, without=0, first=True, seed=5, stop_when_bad=True
    )
    assert counts.bad


STORES: list[tuple[Callable[..., Counts], Callable[[], list[str]], int]] = [
    (enumerate_store_crashes, store_flushes, 6),
    (enumerate_export_crashes, export_flushes, 20),
]


@pytest.mark.parametrize(("crashes", "_", "images"), STORES, ids=["snapshots", "export"])
def test_no_crash_leaves_a_snapshot_or_an_export_that_is_not_whole(
    crashes: Any, _: Any, images: int
) -> None:
    counts = crashes(images=images, seed=1)
    assert counts.images > 400
    assert (counts.wrong, counts.reasons[:3]) == (0, [])


@pytest.mark.parametrize(("crashes", "flushed", "images"), STORES, ids=["snapshots", "export"])
def test_every_fsync_of_snapshots_and_of_an_export_that_is_taken_out_is_missed(
    crashes: Any, flushed: Any, images: int
) -> None:
    names = flushed()
    assert len(names) >= 8
    for number, name in enumerate(names):
        counts = crashes(images=images, seed=2, without=number, stop_when_bad=True)
        assert counts.bad, f"{number} {name}"


@pytest.mark.parametrize("protocol", NAIVE, ids=by_name)
def test_the_ways_that_come_to_mind_first_leave_mixes(protocol: Protocol) -> None:
    assert enumerate_crashes(protocol, images=IMAGES, seed=3).wrong > 0


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("protocol", OURS, ids=by_name)
def test_no_crash_of_very_many_leaves_anything_but_one_generation(protocol: Protocol) -> None:
    counts = enumerate_crashes(protocol, images=SOAK_IMAGES, seed=4)
    assert counts.wrong == 0, counts.reasons[:3]


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("crashes", [enumerate_store_crashes, enumerate_export_crashes])
def test_no_crash_of_very_many_leaves_a_snapshot_or_an_export_that_is_not_whole(
    crashes: Any,
) -> None:
    counts = crashes(images=SOAK_IMAGES, seed=4)
    assert counts.wrong == 0, counts.reasons[:3]
