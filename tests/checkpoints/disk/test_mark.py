"""A mark on disk: whole or not there, whatever it is asked or was left as."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_trainer.checkpoints.disk import Mark


def test_it_says_what_was_written_last_until_it_is_removed(tmp_path: Path) -> None:
    mark = Mark(tmp_path / "folder" / "at-work.json")
    assert (mark.exists, mark.read()) == (False, {})
    for contents in ({"run": "a"}, {"run": "b", "finished": {"steps": [1]}}):
        mark.write(contents)
        assert (mark.exists, Mark(tmp_path / "folder" / "at-work.json").read()) == (True, contents)
    for _ in range(2):
        mark.remove()
        assert not mark.exists
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("left", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_what_cannot_be_read_says_nothing_and_is_there(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "mark").write_bytes(left)
    mark = Mark(tmp_path / "mark")
    assert (mark.exists, mark.read()) == (True, {})
    mark.remove()
    assert not mark.exists
