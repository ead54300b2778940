"""`apollo token` edits the file that a server reads, and shows a token once."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import pytest

from apollo_grpc.scopes import Scope
from apollo_grpc.token_file import TokenFile
from tests.command_line import apollo


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "token"


def token(file: Path, *words: str):
    return apollo("--token-file", str(file), "token", *words, env={"APOLLO_STATE_DIR": "/nowhere"})


def test_a_token_is_shown_once_and_the_file_has_a_digest_that_a_server_takes(file):
    made = token(file, "add", "ci", "--scope", "train", "--days", "30")
    assert made.returncode == 0
    secret = made.stdout.strip()
    assert len(secret) >= 43 and secret not in file.read_text() + made.stderr
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    found = TokenFile(file).find(secret)
    assert (found.name, found.scope) == ("ci", Scope.TRAIN)
    days = (found.expires - datetime.datetime.now(datetime.UTC)) / datetime.timedelta(days=1)
    assert 29.9 < days < 30.1
    assert secret not in token(file, "list").stdout


def test_a_servers_own_token_is_kept_beside_others(file):
    TokenFile(file)
    own = file.read_text()
    secret = json.loads(token(file, "add", "a", "--scope", "read", "--json").stdout)["token"]
    listed = token(file, "list", "--json").stdout.splitlines()
    assert [json.loads(line)["name"] for line in listed] == ["a", "bare"]
    tokens = TokenFile(file)
    assert tokens.find(own).scope is Scope.ADMIN and tokens.find(secret).scope is Scope.READ
    assert token(file, "remove", "bare").returncode == 0
    assert TokenFile(file).find(own) is None and TokenFile(file).find(secret)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["add", "ci", "--scope", "read"], 1, "already"),
        (["add", "bare", "--scope", "read"], 2, "no name"),
        (["add", "a b", "--scope", "read"], 2, "no name"),
        (["add", "b"], 2, "--scope"),
        (["add", "b", "--scope", "owner"], 2, "owner"),
        (["remove", "b"], 1, "no token 'b'"),
        (["remove", "ci"], 1, "the last one"),
    ],
)
def test_what_is_refused_leaves_the_file(file, words, status, told):
    token(file, "add", "ci", "--scope", "read")
    before = file.read_bytes()
    done = token(file, *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert told in done.stderr and "Traceback" not in done.stderr
    assert file.read_bytes() == before
    assert [each.name for each in file.parent.iterdir()] == ["token"]


def test_a_file_that_is_none_is_told(file):
    assert token(file, "list").returncode == 2
    file.parent.mkdir(mode=0o700)
    file.write_text("two\nlines")
    done = token(file, "add", "ci", "--scope", "read")
    assert (done.returncode, file.read_text()) == (2, "two\nlines")
    assert str(file) in done.stderr


@pytest.mark.parametrize("place", ["folder", "pipe"])
def test_what_is_no_file_is_left_as_it_is(tmp_path, place):
    (tmp_path / "folder").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe")
    mode = (tmp_path / place).stat().st_mode
    done = token(tmp_path / place, "add", "ci", "--scope", "read")
    assert done.returncode == 2 and "is no file" in done.stderr
    assert (tmp_path / place).stat().st_mode == mode
