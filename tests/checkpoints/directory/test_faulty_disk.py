"""A disk that fails in any call: whole weights, one generation, and a next sync that works."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from apollo_trainer.checkpoints.directory.recovery import recover
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import held, is_untouched, place_of
from apollo_trainer.checkpoints.directory.sync import (
    SyncMethod,
    SyncOptions,
    SyncOutcome,
    sync_directory,
)
from apollo_trainer.checkpoints.directory.verify import verify_directory
from tests.checkpoints.crash_protocols import files, reader
from tests.checkpoints.faulty_disk import SHORT_WRITE, FaultyFiles, tree

METHODS = (None, SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE)
# Each protocol, and each way in which a write can fail; all with all by `make test-all`.
FIRST = (("EIO", None), (SHORT_WRITE, SyncMethod.ROLLFORWARD), ("EIO", SyncMethod.IN_PLACE))
CASES = [
    pytest.param(
        fault, method,
        id=f"{fault}-{method or 'exchange'}",
        marks=[] if (fault, method) in FIRST else pytest.mark.long,
    )
    for fault in ("EIO", SHORT_WRITE, "ENOSPC", "EINTR", "EDQUOT", "EROFS", "EACCES")
    for method in METHODS
]  # fmt: skip
ENOUGH = 400


def synced(folder: Path, generation: int, options: SyncOptions) -> SyncOutcome:
    version = generation + 1
    return sync_directory(
        folder, reader(generation), versions=lambda name: version, options=options
    )


def made(folder: Path) -> Path:
    """A directory of generation 1, synced once."""
    folder.mkdir()
    for name, data in {**files(0), "config.json": b"{}", "notes.txt": b"mine"}.items():
        (folder / name).write_bytes(data)
    synced(folder, 1, SyncOptions())
    return folder


def generation_of(folder: Path) -> int | str:
    """Of the shards as they lie there."""
    content = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return next((g for g in (0, 1, 2, 3) if files(g) == content), "mix")


@pytest.mark.parametrize(("fault", "method"), CASES)
def test_a_call_that_fails_leaves_one_generation_and_the_next_sync_works(
    tmp_path: Path, fault: str, method: SyncMethod | None
) -> None:
    failures = 0
    for number in range(ENOUGH):
        folder = made(tmp_path / f"model{number}")
        disk = FaultyFiles(number, fault)
        try:
            synced(folder, 2, SyncOptions(method, ops=disk))
        except OSError as error:
            assert error.strerror
            failures += 1
        if not disk.failed:
            break
        place = place_of(folder)
        if method is None:
            assert generation_of(folder) in (1, 2)
        with held(place):
            manifest = recover(place)
        assert manifest
        assert generation_of(folder) == manifest.generation
        assert is_untouched(place, manifest)
        assert (folder / "config.json").exists()
        # What the disk took back must not be taken for synced.
        synced(folder, 3, SyncOptions(method))
        assert generation_of(folder) == 3
        assert (folder / "notes.txt").read_text() == "mine"
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            [*files(3), "config.json", "notes.txt"]
        )
    else:
        pytest.fail("a sync makes more calls than were made to fail")
    assert number > 30
    assert (failures > 20) == (fault != SHORT_WRITE)


def test_a_process_whose_sync_over_spare_shards_failed_goes_on(tmp_path: Path) -> None:
    folder, spare = made(tmp_path / "model"), Spare()
    for generation in (2, 3, 1):
        synced(folder, generation, SyncOptions(spare=spare))
    now = 1
    for number in range(ENOUGH):
        failing, then = now % 3 + 1, (now + 1) % 3 + 1
        assert len(place_of(folder).left_before()) == 2
        disk = FaultyFiles(number, "EIO")
        with contextlib.suppress(OSError):
            synced(folder, failing, SyncOptions(spare=spare, ops=disk))
        if not disk.failed:
            break
        assert generation_of(folder) in (now, failing)
        synced(folder, then, SyncOptions(spare=spare))
        assert generation_of(folder) == then
        assert verify_directory(folder, reader(then), full=True).differences == []
        now = then
    assert 30 < number < ENOUGH - 1


def test_a_full_disk_is_answered_by_a_sync_in_place(tmp_path: Path) -> None:
    class NoRoomForShards(FaultyFiles):
        def create(self, path: Path, mode: int = 0o600) -> int:
            if path.suffix == ".safetensors" and path.parent.name == "tmp-next":
                self.raise_fault(path)
            return super().create(path, mode)

    folder = made(tmp_path / "model")
    shard = folder / "a.safetensors"
    inode = shard.stat().st_ino
    outcome = synced(folder, 2, SyncOptions(ops=NoRoomForShards(-1, "ENOSPC")))
    assert outcome.method == SyncMethod.IN_PLACE
    assert generation_of(folder) == 2
    assert shard.stat().st_ino == inode


@pytest.mark.parametrize("shard", ["a.safetensors", "b.safetensors"])
def test_no_room_at_all_keeps_every_file(tmp_path: Path, shard: str) -> None:
    class Full(FaultyFiles):
        def create(self, path: Path, mode: int = 0o600) -> int:
            if path.name in (shard, "tmp-redo"):
                self.raise_fault(path)
            return super().create(path, mode)

    folder = made(tmp_path / "model")
    before = tree(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        synced(folder, 2, SyncOptions(ops=Full(-1, "ENOSPC")))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("refusal", ["EINVAL", "EBUSY", "EXDEV", "ENOSYS"])
def test_where_folders_cannot_be_exchanged_the_shards_are_rolled_forward(
    tmp_path: Path, refusal: str
) -> None:
    class NoExchange(FaultyFiles):
        def exchange(self, one: Path, other: Path) -> None:
            self.raise_fault(one)

    folder = made(tmp_path / "model")
    outcome = synced(folder, 2, SyncOptions(ops=NoExchange(-1, refusal)))
    assert outcome.method == SyncMethod.ROLLFORWARD
    assert generation_of(folder) == 2


def test_an_exchange_that_is_refused_after_all_is_rolled_forward(tmp_path: Path) -> None:
    class NotThisFolder(FaultyFiles):
        def exchange(self, one: Path, other: Path) -> None:
            if one.name == "model":
                self.raise_fault(one)
            super().exchange(one, other)

    folder = made(tmp_path / "model")
    outcome = synced(folder, 2, SyncOptions(ops=NotThisFolder(-1, "EBUSY")))
    assert outcome.method == SyncMethod.ROLLFORWARD
    assert outcome.tensors_changed == 3
    assert generation_of(folder) == 2


def test_files_that_cannot_be_linked_are_no_reason_to_fail(tmp_path: Path) -> None:
    class NoLinks(FaultyFiles):
        def link(self, source: Path, target: Path) -> None:
            self.raise_fault(source)

    folder = made(tmp_path / "model")
    assert synced(folder, 2, SyncOptions(ops=NoLinks(-1, "EPERM"))).method == "rollforward"
    assert generation_of(folder) == 2
