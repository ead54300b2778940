"""The store: what it says it has is there, whole, and within its limits."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_grpc.errors import (
    AlreadyExists,
    DataLoss,
    InvalidArgument,
    NotFound,
    Quota,
    ResourceExhausted,
)
from apollo_trainer.checkpoints.snapshots import snapshot_store
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.optim import Apollo
from tests import programs
from tests.checkpoints.crash_store import state
from tests.checkpoints.faulty_disk import FaultyFiles
from tests.checkpoints.learner import Learner, assert_same, capture

Make = Callable[..., Any]
# Snapshots and deletes until it is killed, and says when it has begun.
LOOP = """
import sys
from pathlib import Path
from tests.checkpoints.learner import Learner
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore

learner, number = Learner(), 0
store = SnapshotStore(Path(sys.argv[1]), keep_automatic=2)
while True:
    learner.train(number, 1)
    store.create(learner.state())
    if number % 3 == 0:
        store.create(learner.state(), f"{sys.argv[2]} {number}")
    if number % 7 == 6:
        store.delete(store.list()[0].id)
    print(number, flush=True)
    number += 1
"""


@pytest.fixture
def learner() -> Learner:
    return Learner()


class ReadOnly(FaultyFiles):
    """A disk that takes no write."""

    def fails(self, name: str) -> bool:
        return name not in ("open", "pread", "stat", "names")


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def test_snapshots_come_back_bit_for_bit_whatever_came_later(
    tmp_path: Path, learner: Learner
) -> None:
    store, wanted = SnapshotStore(tmp_path), {}
    for group in learner.optimizer.param_groups:
        group["lr"] = 1e-6
    for number in range(4):
        state = learner.state()
        state.extra = {"batch": number}
        wanted[store.create(state, f"after {number}").id] = learner.state()
        learner.train(number, 1)
    again = SnapshotStore(tmp_path)
    assert [info.id for info in again.list()] == list(wanted)
    assert [info.optimizer_step for info in again.list()] == [0, 1, 2, 3]
    for number, (snapshot, state) in enumerate(wanted.items()):
        loaded = again.load(snapshot)
        assert loaded.extra == {"batch": number}
        assert_same(loaded, state)
    assert len(list((tmp_path / "anchors").iterdir())) == 1


def test_a_snapshot_is_a_fraction_of_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(512, 1024).mul(0.02).bfloat16())
    optimizer = Apollo([("w", weight)], lr=1e-6, rank=4)
    store = SnapshotStore(tmp_path)
    store.create(capture({"w": weight}, optimizer), "first")
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    info = store.create(capture({"w": weight}, optimizer), "second")
    moments = sum(t.nbytes for t in optimizer.named_state()[0].values())
    assert info.size_bytes - moments < 0.2 * info.weights_bytes


def test_far_from_the_anchor_a_new_one_is_made(tmp_path: Path, learner: Learner) -> None:
    store = SnapshotStore(tmp_path)
    first = store.create(learner.state(), "first")
    for parameter in learner.parameters.values():
        torch.nn.init.normal_(parameter)
    second, wanted = store.create(learner.state(), "second"), learner.state()
    assert second.anchor != first.anchor
    assert_same(store.load(second.id), wanted)
    store.delete(first.id)
    assert [p.name for p in (tmp_path / "anchors").iterdir()] == [second.anchor]
    assert_same(store.load(second.id), wanted)


def test_names_are_unique_and_one_line(tmp_path: Path, learner: Learner) -> None:
    store = SnapshotStore(tmp_path)
    store.create(learner.state(), "../../mine")
    with pytest.raises(AlreadyExists):
        store.create(learner.state(), " ../../mine ")
    # Another one may have that id, now or later.
    looks_like_an_id = " 00000009-0123456789ab"
    for name in ("a\nb", " ", "n" * 201, "\x00", looks_like_an_id):
        with pytest.raises(InvalidArgument):
            store.create(learner.state(), name)
    assert [info.name for info in store.list()] == ["../../mine"]
    assert {p.name for p in tmp_path.iterdir()} == {"anchors", "snapshots", "trash"}


@pytest.mark.parametrize("snapshot", ["", "..", "../anchors", "00000001-0123456789ab", "tmp-x"])
def test_what_is_no_snapshot_is_not_found(tmp_path: Path, snapshot: str) -> None:
    store = SnapshotStore(tmp_path)
    for call in (store.get, store.delete, store.load):
        with pytest.raises(NotFound):
            call(snapshot)


def test_only_the_newest_automatic_ones_are_kept(tmp_path: Path, learner: Learner) -> None:
    store = SnapshotStore(tmp_path, keep_automatic=2)
    named = store.create(learner.state(), "kept")
    automatic = [store.create(learner.state()).id for _ in range(4)]
    assert [info.id for info in store.list()] == [named.id, *automatic[-2:]]
    assert not list((tmp_path / "trash").iterdir())


def test_automatic_snapshots_give_way_to_the_budget(tmp_path: Path, learner: Learner) -> None:
    store = SnapshotStore(tmp_path)
    one = store.create(learner.state(), "named")
    before = store.size_bytes()
    store.delete(store.create(learner.state(), "as large as the next ones").id)
    store.create(learner.state())
    # A snapshot's time is written with as many digits as it has.
    budget = before + 2 * (store.size_bytes() - before) + 200
    store.delete(store.list()[-1].id)
    store = SnapshotStore(tmp_path, budget_bytes=budget)
    ids = [store.create(learner.state()).id for _ in range(4)]
    assert store.size_bytes() <= budget
    assert [info.id for info in store.list()] == [one.id, *ids[-2:]]


def test_what_does_not_fit_into_the_budget_leaves_nothing(tmp_path: Path, learner: Learner) -> None:
    store = SnapshotStore(tmp_path, budget_bytes=10_000)
    with pytest.raises(ResourceExhausted, match="nothing was written") as caught:
        store.create(learner.state(), "too large")
    assert caught.value.reason == "SNAPSHOT_BUDGET"
    assert caught.value.quota == Quota("snapshot_bytes", "at most 10000")
    assert files(tmp_path) == set()


def test_ids_order_snapshots_when_the_clock_goes_back(tmp_path: Path, learner: Learner) -> None:
    times = iter([3.0, 2.0, 1.0])
    store = SnapshotStore(tmp_path, clock=lambda: next(times), keep_automatic=2)
    ids = [store.create(learner.state()).id for _ in range(3)]
    assert [info.id for info in store.list()] == ids[1:]


def flip(path: Path, at: float = 0.6) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["delta.safetensors", "apollo_state.safetensors", "snapshot.json", "the anchor"]
)
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "empty"])
def test_a_corrupted_snapshot_is_refused_and_left_as_it_is(
    tmp_path: Path, learner: Learner, name: str, how: str
) -> None:
    store = SnapshotStore(tmp_path)
    store.create(learner.state(), "first")
    learner.train(0, 1)
    info = store.create(learner.state(), "second")
    path = tmp_path / "snapshots" / info.id / name
    if name == "the anchor":
        path = tmp_path / "anchors" / info.anchor / "weights.safetensors"
    if how == "flipped":
        flip(path)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -7 if how == "truncated" else 0])
    before = files(tmp_path)
    with pytest.raises(DataLoss) as caught:
        store.load(info.id)
    assert caught.value.reason == "SNAPSHOT_CORRUPT"
    assert files(tmp_path) == before


@pytest.mark.parametrize("at", [0.05, 0.2, 0.4, 0.8, 0.95])
def test_no_flipped_bit_of_a_state_goes_unseen(tmp_path: Path, learner: Learner, at: float) -> None:
    store = SnapshotStore(tmp_path)
    info = store.create(learner.state(), "one")
    flip(tmp_path / "snapshots" / info.id / "apollo_state.safetensors", at)
    with pytest.raises(DataLoss):
        store.load(info.id)


def test_an_anchor_is_kept_while_a_snapshot_cannot_be_read(
    tmp_path: Path, learner: Learner
) -> None:
    store = SnapshotStore(tmp_path)
    first = store.create(learner.state(), "first")
    for parameter in learner.parameters.values():
        torch.nn.init.normal_(parameter)
    second = store.create(learner.state(), "second")
    path = tmp_path / "snapshots" / first.id / "snapshot.json"
    whole = path.read_bytes()
    path.write_bytes(b"{")
    store.create(learner.state(), "third")
    store.delete(second.id)
    path.write_bytes(whole)
    store.load(first.id)


def test_a_snapshot_put_under_another_id_is_refused(tmp_path: Path, learner: Learner) -> None:
    store = SnapshotStore(tmp_path)
    info = store.create(learner.state(), "first")
    (tmp_path / "snapshots" / info.id).rename(tmp_path / "snapshots" / "00000009-0123456789ab")
    with pytest.raises(DataLoss, match="of another snapshot"):
        store.get("00000009-0123456789ab")


def test_a_full_disk_leaves_nothing_half_made(tmp_path: Path) -> None:
    for number in range(400):
        root, disk = tmp_path / f"{number}", FaultyFiles(number, "ENOSPC")
        one = SnapshotStore(root).create(state(0), "first")
        try:
            # Far from the first one: with an anchor of its own.
            SnapshotStore(root, ops=disk).create(state(2), "second")
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert [info.id for info in SnapshotStore(root).list()] == [one.id]
        if not disk.failed:
            break
        store = SnapshotStore(root)
        # What could not be removed goes at the next write.
        store.create(state(3), "third")
        assert not any("tmp-" in file or "trash" in file for file in files(root))
        assert_same(store.load(one.id), state(0))
        for info in store.list():
            store.load(info.id)
    assert number > 40


def test_no_room_for_the_weights_leaves_nothing(tmp_path: Path) -> None:
    _, told = programs.run(
        """
import resource, signal, sys
from pathlib import Path
from tests.checkpoints.learner import Learner
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
learner, store = Learner(), SnapshotStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    store.create(learner.state(), "one")
except OSError as error:
    print(error.strerror)
""",
        tmp_path,
    )
    assert told.startswith("File too large\n"), told
    assert files(tmp_path) == set()


def test_what_a_crash_left_is_removed_at_the_next_start(tmp_path: Path, learner: Learner) -> None:
    store = SnapshotStore(tmp_path)
    info = store.create(learner.state(), "one")
    for left in ("snapshots/tmp-00000002-0123456789ab", "anchors/tmp-x", "trash/00000001-a"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text("half")
    store = SnapshotStore(tmp_path)
    assert [each.id for each in store.list()] == [info.id]
    store.create(learner.state(), "two")
    assert not any("tmp-" in f or "trash" in f for f in files(tmp_path))


def test_a_store_that_is_read_writes_nothing(tmp_path: Path, learner: Learner) -> None:
    info, owned = SnapshotStore(tmp_path / "state").create(learner.state(), "one"), list[int]()
    half = tmp_path / "state" / "snapshots" / "tmp-00000002-0123456789ab"
    half.mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for root in (tmp_path / "state", tmp_path / "nothing there"):
        store = SnapshotStore(root, own=lambda: owned.append(1), ops=ReadOnly(-1, "EROFS"))
        assert [each.id for each in store.list()] == ([info.id] if root.exists() else [])
        assert store.size_bytes() >= 0
    store = SnapshotStore(tmp_path / "state", own=lambda: owned.append(1))
    assert_same(store.load(store.id_of("one")), learner.state())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert owned == []
    store.delete(info.id)
    assert (owned, half.exists()) == ([1], False)


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.long)])
def test_a_killed_process_leaves_a_whole_store(tmp_path: Path, rounds: int) -> None:
    for round_ in range(rounds):
        with programs.running(LOOP, tmp_path, round_) as (_, output):
            output.readline()
            time.sleep(0.05 + 0.037 * round_)
        whole = [p.name for p in (tmp_path / "snapshots").iterdir() if "tmp-" not in p.name]
        store = SnapshotStore(tmp_path, keep_automatic=2)
        assert sorted(whole) == [info.id for info in store.list()]
        for info in store.list():
            store.load(info.id)


@pytest.mark.parametrize("anchor", ["../anchors/x", "..", "", "/etc", "00000001-" + "0" * 13])
def test_an_anchor_out_of_its_folder_is_refused(tmp_path: Path, anchor: str) -> None:
    store = SnapshotStore(tmp_path)
    info = store.create(Learner().state(), "mine")
    folder = tmp_path / "snapshots" / info.id
    (folder / "snapshot.json").unlink()
    snapshot_store.write_info(folder, replace(info, anchor=anchor))
    assert json.loads((folder / "snapshot.json").read_text())
    with pytest.raises(DataLoss) as caught:
        store.load(info.id)
    assert caught.value.reason == "SNAPSHOT_CORRUPT"


def test_an_id_is_found_without_reading_the_other_snapshots(
    tmp_path: Path, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = SnapshotStore(tmp_path), list[str]()
    first, second = store.create(learner.state(), "a"), store.create(learner.state(), "b")
    read_info = snapshot_store.read_info

    def reading(folder: Path, *more: Any) -> Any:
        read.append(folder.name)
        return read_info(folder, *more)

    monkeypatch.setattr(snapshot_store, "read_info", reading)
    assert store.get(store.id_of(second.id)).name == "b"
    assert read == [second.id]
    assert store.id_of("a") == first.id
    for unknown in ("", "c", "../a"):
        with pytest.raises(NotFound):
            store.id_of(unknown)


def test_a_damaged_snapshot_is_told_by_its_id_and_can_be_deleted(
    tmp_path: Path, learner: Learner
) -> None:
    store = SnapshotStore(tmp_path)
    info = store.create(learner.state(), "a")
    flip(tmp_path / "snapshots" / info.id / "snapshot.json", 0.5)
    with pytest.raises(DataLoss):
        store.get(store.id_of(info.id))
    store.delete(store.id_of(info.id))
    assert not (tmp_path / "snapshots" / info.id).exists()
