"""Sync on real file systems that refuse something: whole weights, and a reason that is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_trainer.checkpoints.directory.preconditions import why_not_synced
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import place_under
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from apollo_trainer.checkpoints.directory.verify import verify_directory
from apollo_trainer.checkpoints.disk.tensor_file import write_tensors
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan, CheckpointTensor
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from tests.checkpoints.conftest import LiveDirectory
from tests.checkpoints.crash_protocols import files, reader
from tests.checkpoints.directory.test_faulty_disk import generation_of, made, synced
from tests.checkpoints.faulty_disk import tree
from tests.checkpoints.learner import Learner, assert_same
from tests.checkpoints.private_mounts import (
    DISK,
    NOBODY,
    as_user,
    fill,
    mount,
    on_loop,
    read_only,
    tmpfs,
    used_bytes,
    with_private_mounts,
)

PAGE = 4096
MEGABYTE = 1 << 20
REFLINK = [("mkfs.xfs", "-q", "-m", "reflink=1"), ("mkfs.btrfs", "-q")]


def refused(call: Callable[[], object]) -> int | None:
    """The number of the error that a sync ends with."""
    with pytest.raises(OSError, match=r".") as caught:
        call()
    return caught.value.errno


def assert_rolled_forward(folder: Path, state: Path | None = None) -> None:
    """Two syncs of new weights and one of the same, by renames."""
    options = SyncOptions(state=state)
    for generation in (2, 3):
        outcome = synced(folder, generation, options)
        assert (outcome.method, outcome.tensors_changed) == (SyncMethod.ROLLFORWARD, 3)
        assert generation_of(folder) == generation
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            [*files(3), "config.json", "notes.txt"]
        )
    assert synced(folder, 3, options).method == SyncMethod.UNCHANGED


@with_private_mounts
def test_a_directory_that_is_bound_is_rolled_forward() -> None:
    folder = made(tmpfs() / "model")
    mount("--bind", folder, folder)
    assert_rolled_forward(folder)


@with_private_mounts
def test_a_directory_that_is_a_disk_of_its_own_is_rolled_forward() -> None:
    folder = tmpfs() / "model"
    made(folder)
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    tmpfs(folder, "1M")
    for name, data in content.items():
        (folder / name).write_bytes(data)
    assert_rolled_forward(folder)


@with_private_mounts
def test_a_state_folder_on_another_disk_is_rolled_forward(tmp_path: Path) -> None:
    folder, elsewhere = made(tmp_path / "model"), tmpfs() / "state"
    assert_rolled_forward(folder, elsewhere)
    assert (elsewhere / "manifest.json").exists()
    assert verify_directory(folder, full=True, state=elsewhere).differences == []


@with_private_mounts
def test_a_lower_layer_of_an_overlay_is_synced_and_keeps_its_own_files() -> None:
    disk, model = tmpfs(), DISK / "merged" / "model"
    for name in ("lower", "upper", "work", "merged"):
        (disk / name).mkdir()
    made(disk / "lower" / "model")
    layers = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    mount("-t", "overlay", "-o", layers, "overlay", disk / "merged")
    for generation in (2, 3):
        assert synced(model, generation, SyncOptions()).tensors_changed == 3
        assert generation_of(model) == generation
        assert (model / "notes.txt").read_text() == "mine"
    # Mounted anew, as after a boot.
    mount("--move", disk / "merged", disk / "work")
    mount("-t", "overlay", "-o", f"lowerdir={disk}/upper:{disk}/lower", "overlay", disk / "merged")
    assert generation_of(model) == 3
    assert generation_of(disk / "lower" / "model") == 1


@with_private_mounts
@pytest.mark.parametrize("method", [None, SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE])
def test_a_read_only_file_system_is_told_and_nothing_is_lost(method: SyncMethod | None) -> None:
    folder = made(tmpfs() / "model")
    before = tree(DISK)
    read_only(DISK)
    assert refused(lambda: synced(folder, 2, SyncOptions(method))) == errno.EROFS
    assert tree(DISK) == before
    mount("-o", "remount,rw", DISK)
    synced(folder, 2, SyncOptions(method))
    assert generation_of(folder) == 2


@with_private_mounts
def test_a_directory_that_alone_is_read_only_is_told_and_leaves_no_litter() -> None:
    folder = made(tmpfs() / "model")
    before = tree(DISK)
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)
    assert refused(lambda: synced(folder, 2, SyncOptions())) == errno.EROFS
    assert tree(DISK) == before
    # In place, the log and the announcement fit into the state folder: they wait for the next sync.
    assert refused(lambda: synced(folder, 2, SyncOptions(SyncMethod.IN_PLACE))) == errno.EROFS
    assert generation_of(folder) == 1
    mount("-o", "remount,bind,rw", folder)
    assert synced(folder, 2, SyncOptions()).method == SyncMethod.UNCHANGED
    assert generation_of(folder) == 2
    assert tree(DISK).keys() == before.keys()


@with_private_mounts
def test_what_takes_no_writes_is_told_before_a_sync_is_asked_for() -> None:
    live = LiveDirectory(tmpfs() / "model", "tied", "1GB")

    def why(states: Path | None = None) -> str:
        return why_not_synced(place_under(live.folder, states), live.reader)

    assert why() == ""
    mount("--bind", live.folder, live.folder)
    mount("-o", "remount,bind,ro", live.folder)
    assert why().startswith(f"Nothing can be written to {live.folder}.")
    assert "apollo checkpoint export" in why()
    mount("-o", "remount,bind,rw", live.folder)
    states = DISK / "states"
    states.mkdir()
    mount("--bind", states, states)
    mount("-o", "remount,bind,ro", states)
    assert f"{states}. " in why(states / "of-models")
    assert "--checkpoint-dir" in why(states)
    assert why() == ""


@with_private_mounts
def test_too_little_room_is_told_before_a_sync_is_asked_for() -> None:
    live = LiveDirectory(tmpfs(size="8M") / "model", "untied", "20KB")
    place, size = place_under(live.folder, None), sum(p.nbytes for p in live.parameters.values())
    assert why_not_synced(place, live.reader) == ""
    fill(DISK, size // PAGE * PAGE)
    told = why_not_synced(place, live.reader)
    assert told.startswith(f"What is trained takes {size / 1e6:,.1f} MB, and the disk of {DISK} ")
    assert "apollo checkpoint export" in told
    (DISK / "filler").unlink()
    # What is kept of the generation before gives way: two of these have room, three do not.
    for _ in range(2):
        live.train()
        sync_directory(live.folder, live.reader, options=SyncOptions(spare=Spare()))
    fill(DISK, 8 * PAGE)
    assert why_not_synced(place, live.reader) == ""
    live.train()
    sync_directory(live.folder, live.reader, options=SyncOptions(spare=Spare()))
    live.assert_holds_live_values()


@with_private_mounts
def test_another_user_is_told_before_a_sync_where_the_directory_takes_no_names() -> None:
    """The files themselves may be written, but nothing beside them."""
    live = LiveDirectory(tmpfs() / "model", "tied", "1GB")
    place = place_under(live.folder, None)
    for path in live.folder.iterdir():
        os.chown(path, NOBODY, NOBODY)
    for folder in (live.folder, DISK):
        with as_user(NOBODY):
            assert why_not_synced(place, live.reader).startswith(
                f"Nothing can be written to {folder}."
            )
        os.chown(folder, NOBODY, NOBODY)
    with as_user(NOBODY):
        assert why_not_synced(place, live.reader) == ""
        live.train()
        sync_directory(live.folder, live.reader)


@with_private_mounts
def test_a_parent_that_others_own_is_told_and_nothing_is_written() -> None:
    folder = tmpfs() / "model"
    made(folder)
    for path in (folder, *folder.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    before = tree(DISK)
    with as_user(NOBODY):
        assert refused(lambda: synced(folder, 2, SyncOptions())) == errno.EACCES
    assert tree(DISK) == before
    # What the message says to do works: a state folder where the user may write.
    os.chown(DISK, NOBODY, NOBODY)
    os.chown(DISK / ".model.apollo", NOBODY, NOBODY)
    for path in (DISK / ".model.apollo").iterdir():
        os.chown(path, NOBODY, NOBODY)
    with as_user(NOBODY):
        synced(folder, 2, SyncOptions())
    assert generation_of(folder) == 2


@with_private_mounts
def test_a_directory_that_others_own_is_told_and_nothing_of_it_changes() -> None:
    folder = made(tmpfs() / "model")
    state = DISK / ".model.apollo"
    for path in (DISK, state, *state.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    before = tree(folder)
    with as_user(NOBODY):
        for method in (None, SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE):
            number = refused(lambda: synced(folder, 2, SyncOptions(method)))  # noqa: B023
            assert number in (errno.EACCES, errno.EPERM)
            assert tree(folder) == before
    synced(folder, 2, SyncOptions())
    assert generation_of(folder) == 2


@with_private_mounts
@pytest.mark.parametrize("fitting", ["none", "first", "all but the last"])
def test_without_room_for_a_shard_the_old_weights_load_and_room_is_all_it_takes(
    fitting: str,
) -> None:
    live = LiveDirectory(tmpfs(size="8M") / "model", "untied", "20KB")
    sizes = [-(-p.stat().st_size // PAGE) * PAGE for p in sorted(live.folder.glob("*.safetensors"))]
    sync_directory(live.folder, live.reader)
    old, before = live.loaded(), live.files()
    live.train()
    room = {"none": 0, "first": sizes[0], "all but the last": sum(sizes[:-1])}
    filler = fill(DISK, room[fitting])
    assert refused(lambda: sync_directory(live.folder, live.reader)) == errno.ENOSPC
    assert live.files() == before
    assert all(torch.equal(old[name], p) for name, p in live.loaded().items())
    assert sorted(p.name for p in (DISK / ".model.apollo").iterdir()) == ["LOCK", "manifest.json"]
    filler.unlink()
    sync_directory(live.folder, live.reader)
    live.assert_holds_live_values()


@with_private_mounts
def test_with_room_for_the_changed_tensor_alone_it_is_written_in_place() -> None:
    folder, live = big_model(tmpfs(size="24M"), megabytes=16)
    synced_big(folder, live)
    before = (folder / "model.safetensors").stat().st_ino
    with torch.no_grad():
        live.parameters["t3"].add_(1)
    fill(DISK, 3 * MEGABYTE)
    outcome = synced_big(folder, live)
    assert (outcome.method, outcome.tensors_changed) == (SyncMethod.IN_PLACE, 1)
    assert (folder / "model.safetensors").stat().st_ino == before
    assert verify_directory(folder, live.reader, full=True).differences == []


@pytest.mark.parametrize("mkfs", REFLINK, ids=lambda command: command[0])
@with_private_mounts
def test_where_blocks_are_shared_a_sync_of_one_percent_takes_few_bytes(
    tmp_path: Path, mkfs: tuple[str, ...]
) -> None:
    folder, live = big_model(on_loop(tmp_path / "disk", mkfs), megabytes=100)
    synced_big(folder, live)
    with torch.no_grad():
        live.parameters["t42"].add_(1)
    before = used_bytes(DISK)
    # The old file stays as long as somebody has it open, so that all that is new is counted.
    with (folder / "model.safetensors").open("rb"):
        outcome = synced_big(folder, live)
        taken = used_bytes(DISK) - before
    assert (outcome.method, outcome.tensors_changed) == (SyncMethod.EXCHANGE, 1)
    assert taken < 4 * MEGABYTE
    assert verify_directory(folder, live.reader, full=True).differences == []


class Big:
    """Tensors of a megabyte, and a reader of them."""

    def __init__(self, megabytes: int):
        generator = torch.Generator().manual_seed(3)
        shape = (MEGABYTE // 4,)
        names = [f"t{number}" for number in range(megabytes)]
        self.parameters = {
            name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name in names
        }
        tensors = tuple(CheckpointTensor(n, n, shape, (1,), 0) for n in names)
        plan = CheckpointPlan(dict.fromkeys(names, shape), {}, tensors)
        self.reader = CheckpointReader(plan, self.parameters)


def big_model(disk: Path, megabytes: int) -> tuple[Path, Big]:
    """A directory of one shard of so many megabytes."""
    live, folder = Big(megabytes), disk / "model"
    folder.mkdir()
    tensors = {name: p.detach() for name, p in live.parameters.items()}
    write_tensors(tensors, folder / "model.safetensors", None)
    return folder, live


def synced_big(folder: Path, live: Big) -> Any:
    """A sync with versions, as the server makes it."""
    return sync_directory(
        folder, live.reader, versions=lambda name: live.parameters[name]._version + 1
    )


@with_private_mounts
def test_on_a_read_only_file_system_a_directory_is_verified_and_snapshots_are_listed() -> None:
    folder = made(tmpfs() / "model")
    learner, state = Learner(), DISK / ".model.apollo"
    info = SnapshotStore(state).create(learner.state(), "one")
    read_only(DISK)
    assert verify_directory(folder, reader(1), full=True).differences == []
    store = SnapshotStore(state)
    assert [each.id for each in store.list()] == [info.id]
    assert_same(store.load(info.id), learner.state())
    assert refused(lambda: store.create(learner.state(), "two")) == errno.EROFS
