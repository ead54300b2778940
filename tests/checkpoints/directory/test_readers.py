"""Who else looks at the directory amid a sync: readers that map it, and a clock that jumps."""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions
from tests.checkpoints.crash_protocols import SHARDS, files
from tests.checkpoints.directory.test_faulty_disk import generation_of, made, synced
from tests.checkpoints.faulty_disk import FaultyFiles
from tests.waiting import HANG

SYNCS = 200
HELD = 20
FUTURE = 4_000_000_000  # seconds since 1970: the year 2096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "model")


class Reader:
    """Maps all shards of the folder that it opened, again and again, and keeps the last maps.

    Attributes:
        syncs: that have ended.
    """

    def __init__(self, folder: Path):
        self._folder, self._stop = folder, threading.Event()
        self.seen, self.syncs = set[int | str](), 0
        self.held: list[tuple[int | str, dict[str, mmap.mmap]]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._stop.is_set():
            before = self.syncs
            try:
                mapped = self._mapped()
            except FileNotFoundError:
                # The folder that it opened is whole until the sync after the next.
                if self.syncs == before:
                    self.seen.add("a file is missing")
                continue
            generation = which({name: data[:] for name, data in mapped.items()})
            self.seen.add(generation)
            self.held = [*self.held[-HELD:], (generation, mapped)]

    def _mapped(self) -> dict[str, mmap.mmap]:
        with ExitStack() as opened:
            directory = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, directory)
            mapped = {}
            for name in SHARDS:
                file = os.open(name, os.O_RDONLY, dir_fd=directory)
                opened.callback(os.close, file)
                mapped[name] = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            return mapped

    def end(self) -> None:
        self._stop.set()
        self._thread.join(HANG)


def which(content: dict[str, bytes]) -> int | str:
    return next((g for g in (1, 2, 3) if files(g) == content), "mix")


def test_a_reader_that_maps_in_the_middle_of_syncs_sees_one_generation(folder: Path) -> None:
    # As the server syncs: one that keeps no spare removes the old folder at once.
    reader, options = Reader(folder), SyncOptions(spare=Spare())
    for number in range(SYNCS):
        synced(folder, number % 3 + 1, options)
        reader.syncs += 1
    reader.end()
    assert reader.seen == {1, 2, 3}
    # What was mapped stays what it was, whatever was synced since.
    synced(folder, 1, SyncOptions(SyncMethod.ROLLFORWARD))
    for generation, mapped in reader.held:
        assert which({name: data[:] for name, data in mapped.items()}) == generation


@pytest.mark.parametrize("method", [None, SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE])
def test_files_from_the_future_are_synced_as_any(folder: Path, method: Any) -> None:
    """As after a clock that went back: no order is read out of times."""
    for name in SHARDS:
        os.utime(folder / name, (FUTURE, FUTURE))
    for generation in (2, 3):
        assert synced(folder, generation, SyncOptions(method)).tensors_changed == 3
        assert generation_of(folder) == generation
    disk = FaultyFiles(-1, "EIO")
    assert synced(folder, 3, SyncOptions(ops=disk)).method == SyncMethod.UNCHANGED
    assert disk.calls.count("pread") == 1
