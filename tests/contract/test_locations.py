"""Where sockets and tokens lie, and which folders are refused."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from apollo_grpc import locations
from apollo_grpc.errors import FailedPrecondition


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    for name in ("APOLLO_STATE_DIR", "APOLLO_SIDECAR", "APOLLO_ADDRESS", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_state_folder_is_the_users_own_by_default(tmp_path):
    assert locations.state_folder() == tmp_path / ".local/state/apollo"


def test_xdg_moves_the_state_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert locations.state_folder() == tmp_path / "xdg/apollo"


def test_apollo_state_dir_wins_over_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("APOLLO_STATE_DIR", "~/chosen")
    assert locations.state_folder() == tmp_path / "chosen"


def test_addresses_are_sockets_in_the_state_folder_unless_set(monkeypatch):
    monkeypatch.setenv("APOLLO_STATE_DIR", "/s")
    assert locations.sidecar_address() == "unix:/s/sidecar.sock"
    assert locations.server_address() == "unix:/s/training.sock"
    monkeypatch.setenv("APOLLO_SIDECAR", "unix:/other.sock")
    monkeypatch.setenv("APOLLO_ADDRESS", "localhost:50051")
    assert locations.sidecar_address() == "unix:/other.sock"
    assert locations.server_address() == "localhost:50051"


def test_a_missing_folder_is_made_private(tmp_path):
    made = locations.private_folder(tmp_path / "a/b/state")
    for folder in (made, tmp_path / "a/b", tmp_path / "a"):
        assert folder.is_dir()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert locations.private_folder(tmp_path / "a/b") == tmp_path / "a/b"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o710, 0o704])
def test_a_folder_that_others_can_enter_is_refused(tmp_path, mode):
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(FailedPrecondition, match="chmod 700") as refused:
        locations.private_folder(folder)
    assert refused.value.reason == "STATE_FOLDER_NOT_PRIVATE"
    assert folder.stat().st_mode & 0o777 == mode


def test_a_socket_path_at_the_kernels_limit_is_accepted_and_one_byte_more_refused():
    longest = Path("/" + "x" * (locations.MAX_SOCKET_PATH_BYTES - 1))
    assert locations.socket_address(longest) == f"unix:{longest}"
    with pytest.raises(FailedPrecondition) as refused:
        locations.socket_address(Path(f"{longest}x"))
    assert refused.value.reason == "SOCKET_PATH_TOO_LONG"


def test_the_limit_counts_bytes_not_characters():
    with pytest.raises(FailedPrecondition):
        locations.socket_address(Path("/" + "é" * 60))


def test_a_relative_xdg_folder_is_ignored_as_its_specification_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert locations.state_folder() == tmp_path / ".local/state/apollo"


@pytest.mark.parametrize("name", ["APOLLO_STATE_DIR", "XDG_STATE_HOME", "APOLLO_ADDRESS"])
def test_a_variable_of_nothing_is_one_that_is_not_set(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "")
    folder = tmp_path / ".local/state/apollo"
    assert locations.state_folder() == folder
    assert locations.server_address() == f"unix:{folder}/training.sock"


@pytest.mark.parametrize("home", [None, ""])
def test_without_home_the_password_database_says_where(monkeypatch, home):
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    known = Path(pwd.getpwuid(os.geteuid()).pw_dir)
    assert locations.state_folder() == known / ".local/state/apollo"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("HOME", "relative", "no absolute path"), ("APOLLO_STATE_DIR", "~nobody-here/a", "not known")],
)
def test_a_folder_that_cannot_be_worked_out_is_told(monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    with pytest.raises(FailedPrecondition, match=words) as refused:
        locations.state_folder()
    assert refused.value.reason == "STATE_FOLDER_UNUSABLE"


@pytest.mark.parametrize(
    ("address", "path"),
    [("unix:/a/b.sock", Path("/a/b.sock")), ("localhost:1", None), ("dns:///host:1", None)],
)
def test_only_unix_addresses_have_a_path(address, path):
    assert locations.socket_path(address) == path


def test_a_folder_that_cannot_be_made_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="APOLLO_STATE_DIR") as refused:
        locations.private_folder(tmp_path / "file" / "state")
    assert refused.value.reason == "STATE_FOLDER_UNUSABLE"
