"""What lies in a directory between two syncs: edits, links, readers, other servers, kills."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import scan_cache_dir
from safetensors.torch import load_file, save_file

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_trainer.checkpoints.directory.adopt import adopt_directory
from apollo_trainer.checkpoints.directory.recovery import recover, settle_directory
from apollo_trainer.checkpoints.directory.state_folder import held, is_untouched, place_of
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from apollo_trainer.checkpoints.directory.verify import verify_directory
from tests import programs
from tests.checkpoints.crash_protocols import files, reader
from tests.checkpoints.directory.test_faulty_disk import generation_of, made, synced
from tests.checkpoints.faulty_disk import FaultyFiles

# Syncs the directory to one generation after the other until it is killed.
ENDLESS_SYNC = """
import sys
from pathlib import Path
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from tests.checkpoints.crash_protocols import reader

folder, method = Path(sys.argv[1]), SyncMethod(sys.argv[2])
options = SyncOptions(method, spare=Spare())
readers = {generation: reader(generation) for generation in (1, 2, 3)}
print("begun", flush=True)
while True:
    for live in readers.values():
        sync_directory(folder, live, options=options)
"""
# The same of a real model, whose every weight is the number of the generation.
ENDLESS_MODEL_SYNC = """
import sys
from pathlib import Path
import torch
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.live_model import meta_model

folder, method = Path(sys.argv[1]), SyncMethod(sys.argv[2])
plan = plan_checkpoint(meta_model(str(folder)))
live = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in plan.roots.items()}
generation, options = 0, SyncOptions(method, spare=Spare())
while True:
    generation += 1
    for parameter in live.values():
        parameter.data.fill_(generation)
    sync_directory(folder, CheckpointReader(plan, live), options=options)
    print("synced", flush=True)
"""
MODEL_KILLS = int(os.environ.get("SOAK_MODEL_KILLS", "60"))
KILLS = int(os.environ.get("SOAK_SYNC_KILLS", "300"))
# The default; the others are for `make test-all`.
METHODS = [
    SyncMethod.EXCHANGE,
    pytest.param(SyncMethod.ROLLFORWARD, marks=pytest.mark.long),
    pytest.param(SyncMethod.IN_PLACE, marks=pytest.mark.long),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "model")


def refused(folder: Path, kind: type[Exception] = FailedPrecondition) -> Any:
    with pytest.raises(kind) as caught:
        synced(folder, 2, SyncOptions())
    return caught.value


def test_nothing_moved_reads_no_file(folder: Path) -> None:
    disk = FaultyFiles(-1, "EIO")
    outcome = synced(folder, 1, SyncOptions(ops=disk))
    assert outcome.method == SyncMethod.UNCHANGED
    assert outcome.bytes_compared == 0
    # The manifest alone.
    assert disk.calls.count("pread") == 1
    assert not {"create", "pwrite", "fsync", "rename", "exchange"} & set(disk.calls)


def test_a_write_that_changed_no_byte_moves_the_version_only(folder: Path) -> None:
    before = {p: p.stat().st_ino for p in folder.iterdir()}
    for _ in range(2):
        outcome = sync_directory(folder, reader(1), versions=lambda name: 77)
        assert outcome.method == SyncMethod.UNCHANGED
    assert outcome.bytes_compared == 0
    assert {p: p.stat().st_ino for p in folder.iterdir()} == before


def test_a_file_that_was_edited_between_two_syncs_is_kept(folder: Path) -> None:
    shard = folder / "c.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    error = refused(folder)
    assert error.reason == "DIRECTORY_EDITED"
    assert "c.safetensors" in error.message
    assert "manifest.json" in error.message
    assert shard.read_bytes() == data
    # What the message says to do works.
    place_of(folder).manifest_path.unlink()
    synced(folder, 2, SyncOptions())
    assert generation_of(folder) == 2


@pytest.mark.parametrize("what", ["gone", "new"])
def test_a_shard_that_came_or_went_is_told(folder: Path, what: str) -> None:
    if what == "gone":
        (folder / "c.safetensors").rename(folder.parent / "elsewhere")
        assert refused(folder).reason == "CHECKPOINT_INCOMPLETE"
        return
    save_file({"d0": torch.ones(3)}, folder / "d.safetensors")
    assert refused(folder).reason == "DIRECTORY_EDITED"


def test_a_directory_that_was_copied_back_is_the_same_one(folder: Path) -> None:
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    copy.rename(folder)
    os.utime(folder / "a.safetensors", (1, 1))
    assert synced(folder, 2, SyncOptions()).tensors_changed == 3
    assert generation_of(folder) == 2


def test_a_manifest_that_is_none_is_told_and_kept(folder: Path) -> None:
    manifest = place_of(folder).manifest_path
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert refused(folder).reason == "MANIFEST_UNREADABLE"
    manifest.unlink()
    synced(folder, 2, SyncOptions())
    assert generation_of(folder) == 2


def test_a_manifest_of_another_directory_is_told(folder: Path) -> None:
    state = place_of(folder).state
    moved = folder.rename(folder.with_name("renamed"))
    state.rename(place_of(moved).state)
    assert refused(moved).reason == "MANIFEST_OF_ANOTHER_DIRECTORY"


def test_a_second_server_on_one_folder_is_refused(folder: Path) -> None:
    with held(place_of(folder)):
        assert refused(folder, Unavailable).reason == "STATE_FOLDER_BUSY"
    assert generation_of(folder) == 1
    synced(folder, 2, SyncOptions())


def test_a_link_to_the_directory_stays_one(folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder.name)
    synced(link, 2, SyncOptions())
    assert link.is_symlink()
    assert generation_of(folder) == 2


def test_a_hub_cache_is_refused_and_its_adopted_copy_is_synced(tmp_path: Path) -> None:
    cache = tmp_path / "models--me--model"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.parent.mkdir(parents=True)
    made(tmp_path / "plain").rename(blobs)
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    error = refused(snapshot)
    assert error.reason == "HUB_CACHE"
    assert error.message.startswith("me/model lies in a hub cache")
    # The copy holds the weights of before: what keeps the learned ones is named first.
    assert error.message.index("checkpoint export") < error.message.index("checkpoint adopt")
    assert "without what was learned" in error.message
    told: list[tuple[int, int, str]] = []
    mine = tmp_path / "mine"
    made_of = adopt_directory(snapshot, mine, lambda *progress: told.append(progress))
    assert (made_of.files, told[-1][0]) == (5, told[-1][1])
    assert not any(path.is_symlink() for path in mine.iterdir())
    synced(mine, 2, SyncOptions())
    assert generation_of(mine) == 2
    assert generation_of(blobs) == 1


def test_the_hubs_own_tools_take_a_state_folder_for_no_revision(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--me--model" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    made(tmp_path / "plain").rename(snapshot)
    place = place_of(snapshot)
    with held(place):
        (place.state / "snapshot.json").write_text("{}")
    (repository,) = scan_cache_dir(cache).repos
    # Another one would have no name in refs/, and be removed as one that nobody needs.
    assert repository.size_on_disk == sum(path.stat().st_size for path in snapshot.iterdir())
    assert [revision.commit_hash for revision in repository.revisions] == ["abc"]


def test_a_folder_that_is_only_named_like_a_hub_cache_is_synced(tmp_path: Path) -> None:
    (tmp_path / "models--mine").mkdir()
    folder = made(tmp_path / "models--mine" / "model")
    synced(folder, 2, SyncOptions())
    assert generation_of(folder) == 2


def test_links_and_folders_in_the_directory_are_kept(folder: Path) -> None:
    (folder / "original").mkdir(mode=0o750)
    (folder / "original" / "params.json").write_text("{}")
    (folder / "notes.link").symlink_to("notes.txt")
    folder.chmod(0o750)
    for generation, method in ((2, None), (3, SyncMethod.ROLLFORWARD)):
        synced(folder, generation, SyncOptions(method))
        assert (folder / "original" / "params.json").read_text() == "{}"
        assert (folder / "notes.link").readlink() == Path("notes.txt")
        assert folder.stat().st_mode & 0o777 == 0o750
        assert (folder / "original").stat().st_mode & 0o777 == 0o750
    assert (folder / "notes.txt").stat().st_nlink == 1


def test_a_reader_that_mapped_a_file_keeps_what_it_mapped(folder: Path) -> None:
    shard = folder / "a.safetensors"
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        synced(folder, 2, SyncOptions())
        synced(folder, 3, SyncOptions(SyncMethod.ROLLFORWARD))
        assert mapped[:] == files(1)["a.safetensors"]
    assert generation_of(folder) == 3


def test_a_config_that_is_aside_is_put_back_at_the_start(folder: Path) -> None:
    class DiesAtTheSecondShard(FaultyFiles):
        def rename(self, source: Path, target: Path) -> None:
            if target.name == "b.safetensors":
                self.raise_fault(target)
            super().rename(source, target)

    with pytest.raises(OSError, match="Input/output"):
        synced(folder, 2, SyncOptions(SyncMethod.ROLLFORWARD, ops=DiesAtTheSecondShard(-1, "EIO")))
    assert generation_of(folder) == "mix"
    assert not (folder / "config.json").exists()
    settle_directory(place_of(folder))
    assert (folder / "config.json").exists()
    assert generation_of(folder) == 2


def test_verify_tells_each_thing_that_is_not_as_it_was_left(folder: Path) -> None:
    assert verify_directory(folder, reader(1), full=True).differences == []
    assert {d.tensor for d in verify_directory(folder, reader(2)).differences} == {"a0", "a1", "b0"}
    shard = folder / "b.safetensors"
    data, times = bytearray(shard.read_bytes()), shard.stat()
    data[-1] ^= 1
    with shard.open("r+b") as file:
        file.write(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    # Bytes that rot leave inode, size and time alone.
    assert verify_directory(folder).differences == []
    found = verify_directory(folder, full=True)
    assert [(d.file, d.tensor) for d in found.differences] == [("b.safetensors", "b1")]
    (folder / "a.safetensors").unlink()
    assert "is missing" in {d.description for d in verify_directory(folder).differences}


def kill_at_random(folder: Path, method: SyncMethod, kills: int) -> int:
    """Kills a process that syncs, again and again; returns how often weights had moved."""
    moved, last = 0, generation_of(folder)
    for attempt in range(kills):
        with programs.running(ENDLESS_SYNC, folder, method) as (_, output):
            assert output.readline() == b"begun\n"
            time.sleep(0.02 + 0.0137 * (attempt % 29))
        if method == SyncMethod.EXCHANGE:
            # Also for whoever knows nothing of recovery.
            assert generation_of(folder) in (1, 2, 3)
        place = place_of(folder)
        with held(place):
            manifest = recover(place)
        assert manifest and is_untouched(place, manifest)
        assert generation_of(folder) in (1, 2, 3)
        assert (folder / "config.json").exists()
        for shard in folder.glob("*.safetensors"):
            load_file(shard)
        moved += generation_of(folder) != last
        last = generation_of(folder)
    return moved


@pytest.mark.parametrize("method", METHODS)
def test_a_sync_that_is_killed_at_any_moment_leaves_whole_weights(
    folder: Path, method: SyncMethod
) -> None:
    kill_at_random(folder, method, 2)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "method", [SyncMethod.EXCHANGE, SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE]
)
def test_no_kill_of_many_leaves_anything_but_whole_weights(
    folder: Path, method: SyncMethod
) -> None:
    assert kill_at_random(folder, method, KILLS) > KILLS // 4


def kill_while_a_model_is_synced(live: Any, method: SyncMethod, kills: int) -> set[float]:
    """Kills as above; transformers loads the directory after each. Returns what it loaded."""
    found, rng = set[float](), random.Random(6)
    for _ in range(kills):
        with programs.running(ENDLESS_MODEL_SYNC, live.folder, method) as (_, output):
            assert output.readline() == b"synced\n"
            time.sleep(rng.uniform(0, 0.4))
        settle_directory(place_of(live.folder))
        (value,) = {float(v) for p in live.loaded().values() for v in p.detach().unique()}
        found.add(value)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_one_generation_after_a_kill(
    live_directory: Any, method: SyncMethod
) -> None:
    live = live_directory("untied", shard_size="20KB")
    assert min(kill_while_a_model_is_synced(live, method, 1)) >= 1


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "method", [SyncMethod.EXCHANGE, SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE]
)
def test_transformers_loads_one_generation_after_every_kill(
    live_directory: Any, method: SyncMethod
) -> None:
    live = live_directory("untied", shard_size="20KB")
    assert len(kill_while_a_model_is_synced(live, method, MODEL_KILLS)) > 3
