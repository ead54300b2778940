"""A sync writes over shards of two generations ago that nobody reads; else it writes new files."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import place_of
from apollo_trainer.checkpoints.directory.survey import SyncOutcome
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from apollo_trainer.checkpoints.directory.verify import verify_directory
from apollo_trainer.checkpoints.disk.file_ops import FileOps
from tests.checkpoints.crash_protocols import CHANGES, ELEMENTS, files, live_model, reader
from tests.checkpoints.directory.test_faulty_disk import made
from tests.waiting import HANG

TENSOR_BYTES = 4 * ELEMENTS
HOLD_A_MAP = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
held = mmap.mmap(file, 0, prot=mmap.PROT_READ)
os.close(file)
before = held[:]
print("mapped", flush=True)
sys.stdin.readline()
print("same" if held[:] == before else "changed", flush=True)
"""


class NoRoom(FileOps):
    """A disk that is full but for the shards that are there."""

    def room(self, folder: Path) -> int:
        return 0


class Learner:
    """A model directory, and one process that syncs it."""

    def __init__(self, folder: Path, ops: FileOps | None = None):
        self.folder, self.spare = made(folder), Spare()
        self.ops, self.generation = ops or FileOps(), 1

    @property
    def left(self) -> list[Path]:
        """The directories before this one, the oldest first."""
        place = place_of(self.folder)
        return [place.before(number) for number in place.left_before()]

    def sync(self) -> SyncOutcome:
        """All that changes with a generation."""
        self.generation += 1
        options = SyncOptions(ops=self.ops, spare=self.spare)
        return sync_directory(
            self.folder,
            reader(self.generation),
            versions=lambda name: self.generation + 1 if CHANGES[name] else 2,
            options=options,
        )

    def inode(self, shard: str) -> int:
        return (self.folder / shard).stat().st_ino

    def require_whole(self) -> None:
        shards = {path.name: path.read_bytes() for path in self.folder.glob("*.safetensors")}
        assert shards == files(self.generation)
        found = verify_directory(self.folder, reader(self.generation), full=True)
        assert found.differences == []


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    one = Learner(tmp_path / "model")
    # With two directories before it, the next sync takes the older one apart.
    one.sync()
    one.sync()
    yield one
    one.spare.remove()


def test_the_shards_of_the_last_but_two_are_written_over(learner: Learner) -> None:
    shards = ["a.safetensors", "b.safetensors"]
    before = {shard: (learner.left[0] / shard).stat().st_ino for shard in shards}
    assert (learner.left[0] / "c.safetensors").stat().st_nlink == 3, "it never changed"
    outcome = learner.sync()
    learner.require_whole()
    assert {shard: learner.inode(shard) for shard in before} == before
    assert outcome.bytes_written == 3 * TENSOR_BYTES, "b1 is in the old shard already"


def test_only_what_changed_in_three_generations_is_written(tmp_path: Path) -> None:
    learner = Learner(tmp_path / "model")
    live, inodes, versions = live_model(1), set(), dict[str, int]()
    for number, name in enumerate(["a0", "a0", "a1", "a1", "a1", "a1"], start=3):
        live.parameter(name).data.add_(number)
        versions[name] = number
        outcome = sync_directory(
            learner.folder,
            live,
            versions=lambda name: versions.get(name, 2),
            options=SyncOptions(spare=learner.spare),
        )
        inodes.add(learner.inode("a.safetensors"))
        written = outcome.bytes_written / TENSOR_BYTES
        # Two write a file; then each writes what it and the two before it changed.
        assert round(written) == {3: 2, 4: 2, 5: 2, 6: 2, 7: 1, 8: 1}[number]
        assert verify_directory(learner.folder, live, full=True).differences == []
    assert len(inodes) == 3


def test_other_shards_than_last_time_are_written_anew(learner: Learner) -> None:
    live = live_model(learner.generation)
    for number, name in enumerate(["b0", "c0", "a0"], start=10):
        live.parameter(name).data.add_(1)
        outcome = sync_directory(
            learner.folder,
            live,
            versions=lambda tensor, at=(name, number): at[1] if tensor == at[0] else 2,
            options=SyncOptions(spare=learner.spare),
        )
        assert outcome.files_written == [f"{name[0]}.safetensors"]
        assert verify_directory(learner.folder, live, full=True).differences == []


@contextmanager
def a_reader_of(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD_A_MAP, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "mapped\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_reader_of_two_generations_ago_keeps_what_it_mapped(learner: Learner) -> None:
    with a_reader_of(learner.folder / "a.safetensors") as process:
        inode = learner.inode("a.safetensors")
        for _ in range(4):
            learner.sync()
            learner.require_whole()
            assert learner.inode("a.safetensors") != inode
        assert process.communicate("\n", timeout=HANG)[0] == "same\n"


@pytest.mark.parametrize("mapped", [False, True])
def test_an_open_file_of_this_process_is_not_written_over(learner: Learner, mapped: bool) -> None:
    file = os.open(learner.folder / "a.safetensors", os.O_RDONLY)
    content, held = os.pread(file, 1 << 20, 0), None
    if mapped:
        held = mmap.mmap(file, 0, prot=mmap.PROT_READ)
        os.close(file)
    for _ in range(4):
        learner.sync()
        learner.require_whole()
    assert (held[:] if held else os.pread(file, 1 << 20, 0)) == content
    if held is None:
        os.close(file)


def test_a_file_with_a_second_name_is_not_written_over(learner: Learner, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    kept.hardlink_to(learner.left[0] / "a.safetensors")
    content = kept.read_bytes()
    learner.sync()
    learner.require_whole()
    assert kept.read_bytes() == content


def test_a_spare_file_that_somebody_wrote_to_is_not_trusted(learner: Learner) -> None:
    shard = learner.left[0] / "b.safetensors"
    tensors = load_file(shard)
    tensors["b1"] += 1
    save_file(tensors, shard, {"format": "pt"})
    learner.sync()
    learner.require_whole()


def test_another_process_takes_what_is_there_for_garbage(learner: Learner) -> None:
    learner.spare = Spare()
    learner.sync()
    learner.require_whole()


def test_nothing_is_spared_where_room_is_short(tmp_path: Path) -> None:
    learner = Learner(tmp_path / "model", NoRoom())
    for _ in range(3):
        learner.sync()
        learner.require_whole()
        assert learner.left == []


class FullUntilFreed(FileOps):
    """A disk without room for a new shard beside the directories before."""

    def create(self, path: Path, mode: int = 0o600) -> int:
        if path.parent.name == "tmp-next" and list(path.parent.parent.glob("before-*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().create(path, mode)


def test_what_is_kept_gives_way_before_a_sync_is_made_in_place(learner: Learner) -> None:
    # Of another process, which has no spare shards.
    learner.spare, learner.ops = Spare(), FullUntilFreed()
    assert learner.sync().method == SyncMethod.EXCHANGE
    learner.require_whole()
    assert len(learner.left) == 1


def test_in_the_end_the_directory_before_is_left_alone(learner: Learner) -> None:
    _, before = learner.left
    learner.spare.remove()
    assert learner.left == [before]
    learner.sync()
    learner.require_whole()
