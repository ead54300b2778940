"""Adopt: a private copy that is there whole, or not at all, and replaces nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_grpc.errors import AlreadyExists
from apollo_trainer.checkpoints.directory.adopt import adopt_directory
from tests.checkpoints.directory.test_faulty_disk import made
from tests.checkpoints.faulty_disk import FaultyFiles, tree

FAULTS = ("EIO", "ENOSPC", "EACCES")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return made(tmp_path / "source")


def test_a_folder_that_appeared_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"

    def appear(done: int, total: int, current: str) -> None:
        # An empty one would be replaced by a plain rename.
        target.mkdir(exist_ok=True)

    with pytest.raises(AlreadyExists) as caught:
        adopt_directory(source, target, appear)
    assert caught.value.reason == "FOLDER_EXISTS"
    assert list(target.iterdir()) == []
    assert not list(tmp_path.glob(".mine*"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_fails_leaves_no_copy_and_the_source_as_it_was(
    source: Path, tmp_path: Path, fault: str
) -> None:
    before = tree(source)
    for number in range(200):
        target, disk = tmp_path / f"mine{number}", FaultyFiles(number, fault)
        try:
            adopt_directory(source, target, ops=disk)
        except OSError as error:
            assert error.strerror
        assert tree(source) == before
        if not disk.failed:
            break
        # Once it has its name it is whole, be the folder's own fsync refused or not.
        if target.exists():
            assert tree(target) == before
        assert not list(tmp_path.glob(f".mine{number}.*"))
    assert number > 30
    assert tree(target) == before
