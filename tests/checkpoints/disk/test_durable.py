"""A durable write leaves the new file whole or the old one untouched."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from apollo_trainer.checkpoints.disk.durable import durable_write, flush_folder
from tests import programs

# Writes the target again and again, each time with one letter; says when it has begun.
ENDLESS_WRITER = """
import sys
from pathlib import Path
from apollo_trainer.checkpoints.disk.durable import durable_write

def write_slowly(path, letter):
    with path.open("wb") as file:
        for _ in range(64):
            file.write(letter * 4096)
            file.flush()

target = Path(sys.argv[1])
print("begun", flush=True)
while True:
    for letter in (b"b", b"c"):
        durable_write(target, lambda path: write_slowly(path, letter))
"""


def test_a_new_file_is_written_and_its_size_returned(tmp_path: Path) -> None:
    target = tmp_path / "state"
    assert durable_write(target, lambda path: path.write_bytes(b"abc") and None) == 3
    assert target.read_bytes() == b"abc"
    assert list(tmp_path.iterdir()) == [target]


def test_an_old_file_is_replaced_and_its_mode_kept(tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.write_bytes(b"old")
    target.chmod(0o640)
    durable_write(target, lambda path: path.write_bytes(b"new") and None)
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        durable_write(target, lambda path: path.write_bytes(b"new") and None)
        assert reader.read() == b"old"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_writer_keeps_the_old_file_and_leaves_no_litter(
    tmp_path: Path, error: BaseException
) -> None:
    target = tmp_path / "state"
    target.write_bytes(b"old")

    def fail_halfway(path: Path) -> None:
        path.write_bytes(b"ne")
        raise error

    with pytest.raises(type(error)):
        durable_write(target, fail_halfway)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_fsync_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "state"
    target.write_bytes(b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        durable_write(target, lambda path: path.write_bytes(b"new") and None)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_bytes_are_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, order, fsync, replace = tmp_path / "state", [], os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"  # noqa: PTH112
        order.append(f"fsync of the {kind}")
        fsync(descriptor)

    def watched_replace(path: Path, to: Path) -> Path:
        order.append("rename")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    durable_write(target, lambda path: path.write_bytes(b"new") and None)
    assert order == ["fsync of the file", "rename", "fsync of the folder"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        durable_write(tmp_path / "no" / "state", lambda path: path.write_bytes(b"x") and None)
    with pytest.raises(OSError, match="No such file"):
        flush_folder(tmp_path / "no")


def test_a_writer_killed_at_any_moment_leaves_one_whole_file(tmp_path: Path) -> None:
    target, size = tmp_path / "state", 64 * 4096
    target.write_bytes(b"a" * size)
    for attempt in range(6):
        with programs.running(ENDLESS_WRITER, target) as (_, output):
            assert output.readline() == b"begun\n"
            time.sleep(0.003 + 0.007 * attempt)
        content = target.read_bytes()
        assert len(content) == size
        assert len(set(content)) == 1
        assert len(list(tmp_path.iterdir())) <= 2
    durable_write(target, lambda path: path.write_bytes(b"new") and None)
    assert list(tmp_path.iterdir()) == [target], "what the kills left is gone"
