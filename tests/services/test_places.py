"""Where the server and its callers run: each place is really made, and each refusal has a way out.

`docs/places.md` is the list.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import apollo_trainer.main as server_module
from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError
from apollo_trainer.config import Settings
from tests.checkpoints.private_mounts import NOBODY, fill, read_only, tmpfs, with_private_mounts
from tests.test_pages import missing_tests
from tests.waiting import HANG

PAGE = Path(__file__).parents[2] / "docs" / "places.md"
NAMES = ["a b", "a%20b", "a#b", "a?b", "a\nb", "ü", "a\udcffb", "'\"$;&", "a=b"]


def refusal(**settings: Any) -> ApolloError:
    """What the server says as it starts there."""

    async def start() -> None:
        server_module.TrainingServer(Settings(**settings))

    with pytest.raises(ApolloError) as refused:
        asyncio.run(start())
    return refused.value


def program(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Code as `python -c` runs it, with nothing of torch imported.

    It is not measured: it may not be able to write what it covered.
    """
    given = options.pop("env", None) or os.environ
    options["env"] = {name: given[name] for name in given if not name.startswith("COVERAGE")}
    return subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        errors="backslashreplace",
        timeout=HANG,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


COMMAND = "from apollo_client.command.app import main\n{as_user}\nmain({words})"
# A call before it: what is imported late lies in folders that such a user may not enter.
AS_USER = (
    "import contextlib, os, zoneinfo\n"
    "with contextlib.suppress(SystemExit): main(['--address', 'localhost:1', 'status'])\n"
    "os.setgroups([]); os.setgid({user}); os.setuid({user})\n"
)


def command(
    *words: str, user: int | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`apollo` with these words, as a user who may not enter root's folders, once it is loaded."""
    as_user = AS_USER.format(user=user) if user else "pass"
    done = program(COMMAND.format(as_user=as_user, words=list(words)), **options)
    assert "Traceback" not in (done.stderr or "")
    return done


def environment(folder: Path, **variables: str | None) -> dict[str, str]:
    given = os.environ | {"APOLLO_STATE_DIR": str(folder)} | variables
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("name", NAMES)
def test_a_state_folder_of_any_name_serves(
    start_server: Any, state_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := state_dir / name).mkdir(mode=0o700)
    monkeypatch.setenv("APOLLO_STATE_DIR", str(folder))
    addresses = {n: f"unix:{folder}/{n}.sock" for n in ("training", "sidecar")}
    start_server(state_dir=folder, address=addresses["training"], sidecar=addresses["sidecar"])
    with ApolloClient() as client:
        told = client.status().attachment_detail
    assert told.encode("ascii", "ignore").startswith(b"No sidecar answers at unix:")


def test_a_state_folder_of_too_long_a_path_is_told(state_dir: Path) -> None:
    with pytest.raises(ApolloError) as refused:
        Settings(state_dir=state_dir / ("x" * 100))
    assert refused.value.reason == "SOCKET_PATH_TOO_LONG"


@with_private_mounts
def test_a_state_folder_on_a_read_only_disk_is_told(tmp_path: Path) -> None:
    (folder := tmpfs(tmp_path / "disk") / "apollo").mkdir(mode=0o700)
    read_only(folder.parent)
    for place in (folder, folder.parent / "new"):
        told = refusal(state_dir=place, address="unix:/tmp/s")
        assert "Read-only file system" in told.message and "APOLLO_STATE_DIR" in told.message


@with_private_mounts
def test_a_state_folder_on_a_full_disk_is_told(tmp_path: Path) -> None:
    (folder := tmpfs(tmp_path / "disk", "1M") / "apollo").mkdir(mode=0o700)
    fill(folder.parent, 0)
    told = refusal(state_dir=folder)
    assert "No space left on device" in told.message and "give the disk room" in told.message


def test_a_limit_on_file_sizes_is_told(state_dir: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        told = refusal(state_dir=state_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in told.message


REFUSED = """
from tests.refused_calls import refuse
refuse({call!r})
from pathlib import Path
from apollo_grpc.errors import ApolloError
from apollo_grpc.locations import require_usable
from apollo_grpc.transport import lock_socket
from apollo_sidecar.sealed_memory import sealed_memory
try:
    {act}
except ApolloError as error:
    print(error.message)
"""
ACTS = {
    "memfd_create": "sealed_memory('weights', 4096)",
    "ftruncate": "sealed_memory('weights', 4096)",
    "flock": "lock_socket(Path({folder!r}) / 's.sock')",
    "fsync": "require_usable(Path({folder!r}))",
    "fdatasync": "require_usable(Path({folder!r}))",
}


@pytest.mark.parametrize("call", ACTS)
def test_a_call_that_seccomp_refuses_is_named_with_what_to_do(state_dir: Path, call: str) -> None:
    act = ACTS[call].format(folder=str(state_dir))
    done = program(REFUSED.format(call=call, act=act), cwd=PAGE.parents[1])
    assert done.stderr == ""
    assert call in done.stdout and "Operation not permitted" in done.stdout
    assert "seccomp profile" in done.stdout or "APOLLO_STATE_DIR" in done.stdout


def test_a_user_without_an_entry_and_a_home_is_told() -> None:
    clean = {"PATH": os.environ["PATH"]}
    done = command("status", env=clean, user=54321)
    assert done.returncode == 1
    assert "User 54321 has no home folder here" in done.stderr
    assert "APOLLO_STATE_DIR" in done.stderr


@pytest.mark.parametrize("home", ["relative", "~", "."])
def test_a_home_that_is_no_absolute_path_is_told(home: str) -> None:
    done = command("status", env=os.environ | {"HOME": home})
    assert done.returncode == 1 and "no absolute path" in done.stderr


def test_another_users_server_is_told_from_one_that_is_not_there(
    start_server: Any, state_dir: Path
) -> None:
    start_server()

    done = command("status", env=environment(state_dir), user=NOBODY)
    assert done.returncode == 3
    assert "Its folder is another user's" in done.stderr


def test_a_folder_of_another_users_is_not_made_ones_own(state_dir: Path) -> None:
    os.chown(state_dir, NOBODY, NOBODY)
    try:
        told = refusal(state_dir=state_dir)
    finally:
        os.chown(state_dir, os.geteuid(), os.getegid())
    assert told.reason == "STATE_FOLDER_NOT_PRIVATE"
    assert f"User {NOBODY} owns it" in told.message and "chmod" not in told.message


PLAIN = {"LC_ALL": "POSIX", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TERMINALS: dict[str, dict[str, str | None]] = {
    "a plain locale": {**PLAIN},
    "one column": {"COLUMNS": "1"},
    "no columns": {"COLUMNS": "0"},
    "more columns than memory": {"COLUMNS": "9" * 12},
    "columns that are no number": {"COLUMNS": "³"},
    "a dumb terminal": {"TERM": "dumb", "FORCE_COLOR": "1"},
    "no colour": {"NO_COLOR": "1"},
    "no folder for temporary files": {"TMPDIR": "/nowhere"},
}


@pytest.mark.parametrize("place", TERMINALS)
def test_what_is_said_can_be_said_there(state_dir: Path, place: str) -> None:
    (folder := state_dir / "ü").mkdir(mode=0o700)
    where = {"env": environment(folder, **TERMINALS[place])}
    done = command("status", **where)
    assert done.returncode == 3
    assert "apollo up MODEL" in done.stderr.replace("\n", " ")
    assert command("--help", **where).returncode == 0


CLOSING = "import os; [os.close(n) for n in {numbers}]; os.execv({python!r}, {words!r})"


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_get_nothing_and_lose_nothing(
    state_dir: Path, numbers: tuple[int, ...]
) -> None:
    words = [sys.executable, "-c", COMMAND.format(as_user="pass", words=["status"])]
    code = CLOSING.format(numbers=numbers, python=sys.executable, words=words)
    done = program(code, env=environment(state_dir))
    assert done.returncode == 3
    assert ("apollo up MODEL" in done.stderr) == (2 not in numbers)


def test_an_output_that_is_full_is_told_and_one_that_nobody_reads_is_not(state_dir: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = command("--help", env=environment(state_dir), stdout=full)
    assert done.returncode == 1 and "No space left on device" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = command("--help", env=environment(state_dir), stdout=pipe)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_clock_that_goes_back_leaves_runs_in_their_order(
    caller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes back a day between two runs."""
    import apollo_trainer.ledger.events as events_module

    first = caller.train()
    real = events_module.now

    def yesterday() -> Any:
        found = real()
        found.seconds -= 86400
        return found

    monkeypatch.setattr(events_module, "now", yesterday)
    second = caller.train()
    assert second[-1].finished.state == first[-1].finished.state
    listed = [run.run_id for run in caller.list().runs]
    assert listed == [second[0].run_id, first[0].run_id]


def test_the_page_names_tests_that_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text())
    assert len(named) >= 20
    assert missing_tests(PAGE) == []
