"""Whose token is taken, from where, and what a user is told of one that is not."""

from __future__ import annotations

import datetime
import logging
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.scopes import Scope
from apollo_grpc.token_file import BARE, TokenFile, edit, parsed
from apollo_grpc.tokens import Token, as_token, digest_of, own_token, read_token


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path):
    path = tmp_path / "state" / "token"
    TokenFile(path)
    token = path.read_text()
    assert len(token) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert TokenFile(path).find(token).scope is Scope.ADMIN
    assert TokenFile(tmp_path / "other" / "token").find(token) is None


def test_a_token_is_not_made_where_others_can_look(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(FailedPrecondition):
        TokenFile(tmp_path / "open" / "token")
    assert list((tmp_path / "open").iterdir()) == []


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o444, 0o644, 0o440])
def test_a_secret_in_an_open_folder_is_taken_whoever_may_read_it(tmp_path, mode, caplog):
    (folder := tmp_path / "secrets").mkdir(mode=0o755)
    (folder / "token").write_text("from-outside-as-a-secret\n")
    (folder / "token").chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert TokenFile(folder / "token").find("from-outside-as-a-secret")
    assert bool(caplog.records) == bool(mode & 0o004)


def test_a_secret_as_kubernetes_mounts_it_is_taken(tmp_path):
    (dated := tmp_path / "..2026_11_29").mkdir(mode=0o755)
    (dated / "token").write_text("from-outside")
    (tmp_path / "..data").symlink_to(dated.name)
    (tmp_path / "token").symlink_to("..data/token")
    assert TokenFile(tmp_path / "token").find("from-outside")


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_token_that_others_can_write_is_refused(tmp_path, mode):
    (path := tmp_path / "token").write_text("a")
    path.chmod(mode)
    with pytest.raises(FailedPrecondition, match="chmod go-w") as refused:
        TokenFile(path)
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
        TokenFile(path)
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
        TokenFile(tmp_path / "state" / "token")


def test_a_token_through_a_pipe_is_read():
    reader, writer = os.pipe()
    os.write(writer, b"from-a-command\n")
    os.close(writer)
    assert read_token(Path(f"/dev/fd/{reader}"), "--token-file") == "from-a-command"
    os.close(reader)


def test_white_space_around_a_token_is_not_part_of_it():
    assert as_token(" a b\r\n", "APOLLO_TOKEN") == "a b"


LATER = datetime.datetime(2099, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
TOKENS = st.builds(
    Token,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True).filter(BARE.__ne__),
    scope=st.sampled_from(Scope),
    digest=st.binary(min_size=32, max_size=32).map(bytes.hex),
    expires=st.none()
    | st.datetimes(datetime.datetime(2000, 1, 1), timezones=st.just(datetime.UTC)).map(
        lambda time: time.replace(microsecond=0)
    ),
)


@given(st.lists(TOKENS, min_size=1, unique_by=lambda token: token.name))
def test_what_is_written_is_read_again(tokens):
    assert parsed("".join(f"{token.line()}\n" for token in tokens), "file") == tuple(tokens)


@given(st.text(st.characters(codec="ascii"), max_size=200))
def test_any_text_is_tokens_or_is_refused(text):
    try:
        assert parsed(text, "file")
    except InvalidArgument as refused:
        assert refused.message.startswith("file: ")


def test_hashed_tokens_stand_beside_one_bare_one_which_callers_find(tmp_path):
    hashed = Token("ci", Scope.TRAIN, digest_of("a-secret"), LATER)
    (path := tmp_path / "token").write_text(f"bare-and-longer-than-short\n\n{hashed.line()}\n")
    tokens = TokenFile(path)
    assert tokens.find("a-secret") == hashed
    assert tokens.find("bare-and-longer-than-short").scope is Scope.ADMIN
    assert tokens.find(hashed.line()) is tokens.find("") is tokens.find("a-secret ") is None
    assert read_token(path, "--token-file") == "bare-and-longer-than-short"


def test_a_file_of_hashes_has_no_token_for_callers(tmp_path):
    (path := tmp_path / "token").write_text(Token("ci", Scope.READ, digest_of("a")).line())
    assert own_token(path, "token") is None
    with pytest.raises(InvalidArgument, match="it was shown when it was made"):
        read_token(path, "--token-file")


WRONG_LINES = [
    "ci owner never sha256:" + "0" * 64,
    "ci train never sha256:" + "0" * 63,
    "ci train tomorrow sha256:" + "0" * 64,
    "ci train 2026-02-30T00:00:00Z sha256:" + "0" * 64,
    "a b train never sha256:" + "0" * 64,
]


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_line_that_is_nearly_a_hashed_token_is_no_bare_one(tmp_path, line):
    (path := tmp_path / "token").write_text(line)
    with pytest.raises(InvalidArgument, match=r"is no t|that is no token"):
        TokenFile(path)


def test_two_tokens_of_one_name_are_refused():
    line = Token("ci", Scope.READ, digest_of("a")).line()
    with pytest.raises(InvalidArgument, match="two tokens named ci"):
        parsed(f"{line}\n{line}", "file")


def test_a_short_word_is_warned_of(caplog):
    parsed("secret", "file")
    assert "shorter than 16" in caplog.text


@pytest.mark.parametrize("content", ["", "two\nlines", None])
def test_a_file_that_cannot_be_taken_leaves_the_tokens_before_it(tmp_path, caplog, content):
    (path := tmp_path / "token").write_text("the-first-of-two-tokens")
    tokens = TokenFile(path)
    path.unlink() if content is None else path.write_text(content)
    tokens.reload()
    assert tokens.find("the-first-of-two-tokens")
    assert "the tokens before it stay" in caplog.text
    path.write_text("the-second-of-two-tokens")
    tokens.reload()
    assert tokens.find("the-second-of-two-tokens") and not tokens.find("the-first-of-two-tokens")


def test_an_edit_that_fails_leaves_the_file_and_nothing_beside_it(tmp_path):
    (path := tmp_path / "token").write_text("the-first-of-two-tokens")

    def change(before):
        raise InvalidArgument("no")

    with pytest.raises(InvalidArgument):
        edit(path, change)
    assert [each.name for each in tmp_path.iterdir()] == ["token"]
    assert path.read_text() == "the-first-of-two-tokens"


def test_edits_at_one_time_lose_none(tmp_path):
    path = tmp_path / "state" / "token"

    def add(name):
        edit(path, lambda before: (*before, Token(name, Scope.READ, digest_of(name))))

    names = [f"of-{number}" for number in range(20)]
    threads = [threading.Thread(target=add, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(token.name for token in TokenFile(path).all) == sorted(names)
    assert path.stat().st_mode & 0o777 == 0o600
