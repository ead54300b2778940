"""Datasets are there whole or not at all, once each, and within their limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apollo_grpc.errors import (
    ApolloError,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from apollo_trainer.checkpoints.disk import TEMPORARY
from apollo_trainer.datasets import DatasetStore
from apollo_trainer.datasets.file_format import records
from apollo_trainer.datasets.room import Room
from tests.checkpoints.faulty_disk import CALLS, FaultyFiles
from tests.datasets.conftest import bring, sample

Open = Callable[..., DatasetStore]


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "datasets").iterdir())


def test_a_dataset_is_read_back_also_by_the_next_server(open_store: Open) -> None:
    made = bring(open_store(), [sample(1), sample(2)], [sample(3)], name="first")
    assert (made.name, made.samples) == ("first", 3)
    assert made.digest.startswith(made.dataset_id) and len(made.digest) == 64
    later = open_store()
    assert later.all() == [made] and later.get(made.dataset_id) == made
    stored = later.samples(made.dataset_id)
    assert len(stored) == 3
    assert list(stored) == list(stored) == [sample(1), sample(2), sample(3)]


def test_the_same_samples_are_the_same_dataset(store: DatasetStore, tmp_path: Path) -> None:
    first = bring(store, [sample(1)], [sample(2)], name="first")
    again = bring(store, [sample(1), sample(2)], name="second")
    assert again == first
    assert bring(store, [sample(2), sample(1)]).dataset_id != first.dataset_id
    assert len(names(tmp_path)) == len(store.all()) == 2


def test_the_newest_is_first(store: DatasetStore) -> None:
    made = [bring(store, [sample(number)]) for number in range(3)]
    assert store.all() == made[::-1]


def test_an_upload_that_is_given_up_leaves_nothing(store: DatasetStore, tmp_path: Path) -> None:
    upload = store.begin("a")
    upload.add([sample(1)])
    assert [name.startswith(TEMPORARY) for name in names(tmp_path)] == [True]
    upload.close()
    upload.close()
    assert names(tmp_path) == [] and store.all() == []


def test_what_a_killed_server_left_is_removed_at_the_next_start(
    open_store: Open, tmp_path: Path
) -> None:
    made = bring(open_store(), [sample(1)])
    open_store().begin("killed").add([sample(2)])
    (tmp_path / "datasets" / "notes.txt").write_text("mine")
    assert open_store().all() == [made]
    assert names(tmp_path) == [made.dataset_id, "notes.txt"]


def test_a_dataset_without_samples_is_none(store: DatasetStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        bring(store, [])
    assert caught.value.violations[0].field == "samples"
    assert names(tmp_path) == []


def test_a_dataset_has_no_more_samples_than_it_may(store: DatasetStore) -> None:
    most = [sample(number) for number in range(100)]
    assert bring(store, most[:60], most[60:]).samples == 100
    with pytest.raises(ResourceExhausted) as caught:
        bring(store, most, [sample(100)])
    assert (caught.value.reason, caught.value.metadata) == ("DATASET_TOO_LARGE", {"limit": "100"})


def test_the_bytes_of_all_are_bounded_and_free_again(open_store: Open) -> None:
    size = len(records([sample(1)]))
    store = open_store(limit_bytes=3 * size)
    first = bring(store, [sample(1)])
    waits = store.begin("waits")
    waits.add([sample(2)])
    # What is being brought counts too, and what is there already is brought within the room.
    assert bring(store, [sample(1)]) == first
    with pytest.raises(ResourceExhausted) as caught:
        bring(store, [sample(3)], [sample(4)])
    assert caught.value.reason == "DATASETS_FULL" and caught.value.quota is not None
    waits.close()
    bring(store, [sample(3)], [sample(4)])
    store = open_store(limit_bytes=3 * size)
    with pytest.raises(ResourceExhausted):
        bring(store, [sample(5)])
    store.delete(first.dataset_id)
    bring(store, [sample(5)])


def test_datasets_are_counted() -> None:
    room = Room(100, most=2)
    room.keep(1)
    room.take(1, datasets=1)
    with pytest.raises(ResourceExhausted) as caught:
        room.take(1, datasets=1)
    assert caught.value.metadata == {"limit": "2", "unit": "datasets"}
    room.give_back(1, datasets=1)
    room.take(99, datasets=1)


def test_one_that_is_deleted_is_gone(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    made = bring(store, [sample(1)])
    samples = store.samples(made.dataset_id)
    read = iter(samples)
    assert next(read) == sample(1)
    store.delete(made.dataset_id)
    for look in (store.get, store.samples, store.delete, open_store().get, lambda _: list(samples)):
        with pytest.raises(NotFound) as caught:
            look(made.dataset_id)
        assert caught.value.reason == "DATASET_NOT_FOUND"
    assert names(tmp_path) == [] and list(read) == []


@pytest.mark.parametrize("place", [5, -1])
def test_a_damaged_file_is_told_and_brought_anew(
    open_store: Open, tmp_path: Path, place: int
) -> None:
    made = bring(open_store(), [sample(1), sample(2)], name="first")
    path = tmp_path / "datasets" / made.dataset_id
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    store = open_store()
    with pytest.raises(DataLoss) as caught:
        list(store.samples(made.dataset_id))
    assert caught.value.reason == "DATASET_DAMAGED"
    bring(store, [sample(1), sample(2)])
    assert list(open_store().samples(made.dataset_id)) == [sample(1), sample(2)]
    store.delete(made.dataset_id)
    assert store.all() == []


def test_a_file_whose_end_is_damaged_is_not_listed_and_can_be_deleted(
    open_store: Open, tmp_path: Path
) -> None:
    made = bring(open_store(), [sample(1)])
    (tmp_path / "datasets" / made.dataset_id).write_bytes(b"cut")
    store = open_store()
    assert store.all() == []
    with pytest.raises(DataLoss):
        store.get(made.dataset_id)
    store.delete(made.dataset_id)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition) as caught:
        DatasetStore(tmp_path / "file" / "datasets", limit_bytes=1, max_samples=1)
    assert caught.value.reason == "STATE_FOLDER_UNUSABLE"


@pytest.mark.parametrize(
    ("fault", "reason"), [("ENOSPC", "DISK_FULL"), ("EIO", "DATASET_NOT_WRITTEN")]
)
def test_whatever_the_disk_refuses_a_dataset_is_whole_or_not_there(
    tmp_path: Path, fault: str, reason: str
) -> None:
    def attempt(number: int, folder: Path) -> str:
        """Brings a dataset while one call fails; returns the call that did."""
        ops = FaultyFiles(-1, fault)
        store = DatasetStore(folder, limit_bytes=2**20, max_samples=100, ops=ops)
        bring(store, [sample(0)])
        ops.number, ops.calls = number, []
        try:
            made = bring(store, [sample(1)], [sample(2)])
        except ApolloError as error:
            assert error.reason == reason, ops.failed
            made = None
        failed, ops.number = ops.failed, -1
        there = DatasetStore(folder, limit_bytes=2**20, max_samples=100).all()
        assert there == store.all() and (made is None or made in there)
        assert len(there) == 1 + bool(made)
        assert bring(store, [sample(1)], [sample(2)]).samples == 2
        return failed

    failed = {attempt(number, tmp_path / str(number)) for number in range(12)}
    assert {"create", "pwrite", "fsync", "rename", "sync_folder", ""} <= failed <= {*CALLS, ""}
