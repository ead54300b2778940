"""Whose token is taken, from where, and what a user is told of one that is not."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.tokens import as_token, read_or_create_token, read_token


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path):
    path = tmp_path / "state" / "token"
    token = read_or_create_token(path)
    assert len(token) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_or_create_token(path) == token
    assert read_or_create_token(tmp_path / "other" / "token") != token


def test_a_token_is_not_made_where_others_can_look(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(FailedPrecondition):
        read_or_create_token(tmp_path / "open" / "token")
    assert list((tmp_path / "open").iterdir()) == []


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o444, 0o644, 0o440])
def test_a_secret_in_an_open_folder_is_taken_whoever_may_read_it(tmp_path, mode, caplog):
    (folder := tmp_path / "secrets").mkdir(mode=0o755)
    (folder / "token").write_text("from-outside\n")
    (folder / "token").chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert read_or_create_token(folder / "token") == "from-outside"
    assert bool(caplog.records) == bool(mode & 0o004)


def test_a_secret_as_kubernetes_mounts_it_is_taken(tmp_path):
    (dated := tmp_path / "..2026_11_29").mkdir(mode=0o755)
    (dated / "token").write_text("from-outside")
    (tmp_path / "..data").symlink_to(dated.name)
    (tmp_path / "token").symlink_to("..data/token")
    assert read_or_create_token(tmp_path / "token") == "from-outside"


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_token_that_others_can_write_is_refused(tmp_path, mode):
    (path := tmp_path / "token").write_text("a")
    path.chmod(mode)
    with pytest.raises(FailedPrecondition, match="chmod go-w") as refused:
        read_or_create_token(path)
    assert refused.value.reason == "TOKEN_FILE_NOT_PRIVATE"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"two\nlines", "no token"),
        ("\u00fc".encode(), "no token"),
        (b"\0" * 10, "no token"),
        (b"x" * 5000, "no token"),
    ],
)
def test_a_file_without_a_token_is_refused_and_left(tmp_path, content, words):
    (path := tmp_path / "token").write_bytes(content)
    with pytest.raises(InvalidArgument, match=words) as refused:
        read_or_create_token(path)
    assert str(path) in refused.value.message
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["folder", "missing", "/dev/full", "file/below"])
def test_what_cannot_be_read_is_told(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="--token-file"):
        read_token(tmp_path / name, "--token-file")


def test_a_link_to_nothing_is_no_traceback(tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "token").symlink_to(tmp_path / "nothing")
    with pytest.raises(InvalidArgument, match="No such file"):
        read_or_create_token(tmp_path / "state" / "token")


def test_a_token_through_a_pipe_is_read():
    reader, writer = os.pipe()
    os.write(writer, b"from-a-command\n")
    os.close(writer)
    assert read_token(Path(f"/dev/fd/{reader}"), "--token-file") == "from-a-command"
    os.close(reader)


def test_white_space_around_a_token_is_not_part_of_it():
    assert as_token(" a b\r\n", "APOLLO_TOKEN") == "a b"
