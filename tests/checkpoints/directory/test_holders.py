"""Who holds the directory itself, and not its name, sees it whole: never stripped, never mixed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_trainer.checkpoints.directory.recovery import settle_directory
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import place_of
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from apollo_trainer.checkpoints.directory.verify import verify_directory
from apollo_trainer.checkpoints.disk.file_ops import FileOps
from tests.checkpoints.crash_protocols import SHARDS, files, reader
from tests.checkpoints.directory.test_faulty_disk import generation_of, made, synced
from tests.checkpoints.private_mounts import DISK, mount, tmpfs, with_private_mounts
from tests.waiting import HANG

LOOKS, MANY_LOOKS = 10_000, 1_000_000
GONE = "gone"


class UnseenMounts(FileOps):
    """As where the mount is in the name space of another container."""

    def is_bound_elsewhere(self, folder: Path) -> bool:
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "model")


def look(directory: int) -> int | str:
    """What a loader gets that reads config.json, then the shards, in a directory that it holds."""
    content = {}
    try:
        read_at(directory, "config.json")
        for shard in SHARDS:
            content[shard] = read_at(directory, shard)
    except FileNotFoundError:
        return GONE
    return next((g for g in (1, 2, 3) if files(g) == content), "mix")


def read_at(directory: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY, dir_fd=directory)
    try:
        return os.pread(file, 1 << 20, 0)
    finally:
        os.close(file)


class Looks:
    """Looks again and again, on a thread of its own; `seen` counts what was there."""

    def __init__(self, directory: int):
        self._directory, self._stop, self.seen = directory, threading.Event(), dict[Any, int]()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.is_set():
            found = look(self._directory)
            self.seen[found] = self.seen.get(found, 0) + 1

    def end(self) -> None:
        self._stop.set()
        self._thread.join(HANG)


@contextmanager
def held(folder: Path) -> Iterator[int]:
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)


def look_through_handles(folder: Path, at_least: int) -> None:
    """Each handle is opened before a sync, and looked through until the one after the next."""
    options, looks = SyncOptions(spare=Spare()), 0
    while looks < at_least:
        generation = generation_of(folder)
        with held(folder) as directory:
            looking = Looks(directory)
            for _ in range(2):
                synced(folder, int(generation_of(folder)) % 3 + 1, options)
            looking.end()
            assert look(directory) == generation
        assert set(looking.seen) <= {generation}
        looks += sum(looking.seen.values()) + 1


def test_a_handle_sees_one_generation_until_the_sync_after_the_next(folder: Path) -> None:
    look_through_handles(folder, LOOKS)


@pytest.mark.long
def test_a_handle_sees_one_generation_in_very_many_looks(folder: Path) -> None:
    look_through_handles(folder, MANY_LOOKS)


def test_a_handle_that_is_held_longer_sees_no_mix_and_then_no_model(folder: Path) -> None:
    options = SyncOptions(spare=Spare())
    with held(folder) as directory:
        looking = Looks(directory)
        for number in range(12):
            synced(folder, (number + 1) % 3 + 1, options)
        looking.end()
        assert set(looking.seen) <= {1, GONE}
        assert os.listdir(directory) == []  # noqa: PTH208


def test_a_server_that_is_killed_or_ends_leaves_the_directory_before_whole(folder: Path) -> None:
    spare = Spare()
    synced(folder, 2, SyncOptions(spare=spare))
    with held(folder) as directory:
        synced(folder, 3, SyncOptions(spare=spare))
        settle_directory(place_of(folder))
        assert look(directory) == 2
        spare.remove()
        assert look(directory) == 2
        # Another process knows nothing of what is in it, and leaves it as long.
        synced(folder, 1, SyncOptions(spare=Spare()))
        assert look(directory) == 2
    assert verify_directory(folder, reader(1), full=True).differences == []


def test_in_place_nothing_is_written_into_a_directory_before(folder: Path) -> None:
    """Shards that did not change are one file with two names."""
    spare = Spare()
    with held(folder) as directory:
        synced(folder, 2, SyncOptions(spare=spare))
        sync_directory(folder, reader(3), options=SyncOptions(SyncMethod.IN_PLACE, spare=spare))
        assert look(directory) == GONE
    assert generation_of(folder) == 3


@with_private_mounts
def test_a_bound_view_of_the_directory_has_each_sync() -> None:
    folder, view, options = made(tmpfs() / "model"), DISK / "a view", SyncOptions(spare=Spare())
    view.mkdir()
    mount("--bind", folder, view)
    for generation in (2, 3, 1, 2):
        assert synced(folder, generation, options).method == SyncMethod.ROLLFORWARD
        with held(view) as directory:
            assert look(directory) == generation


@with_private_mounts
def test_a_view_in_another_name_space_keeps_what_it_showed() -> None:
    folder, view = made(tmpfs() / "model"), DISK / "view"
    view.mkdir()
    mount("--bind", folder, view)
    options = SyncOptions(spare=Spare(), ops=UnseenMounts())
    seen = []
    for generation in (2, 3, 1, 2):
        assert synced(folder, generation, options).method == SyncMethod.EXCHANGE
        with held(view) as directory:
            seen.append(look(directory))
    assert seen == [1, 1, GONE, GONE]


def test_a_loader_that_holds_the_directory_loads_one_generation(live_directory: Any) -> None:
    """The way for loaders that open several shards by their paths, one after the other."""
    live = live_directory("untied", shard_size="20KB")
    sync_directory(live.folder, live.reader)
    old = live.loaded()
    with held(live.folder) as directory:
        live.train()
        sync_directory(live.folder, live.reader, options=SyncOptions(spare=Spare()))
        model = AutoModelForCausalLM.from_pretrained(f"/proc/self/fd/{directory}")
    assert all(torch.equal(old[name], p) for name, p in model.named_parameters())
    live.assert_holds_live_values()
