"""Whatever the server's flags and environment say: a documented status, no traceback."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import apollo_trainer.main as server_module
from apollo_trainer import memory_command, recover_command
from apollo_trainer.config import Settings
from tests import hostile

EXAMPLES = int(os.environ.get("SOAK_COMMAND_LINES", "30"))
# Ended when it was asked to, refused, and wrong settings.
STATUSES = {0, 1, 2}
FLAGS = [f"--{name.replace('_', '-')}" for name in Settings.model_fields]
PARSERS = {
    each.NAME: each._parser("apollo-training-server") for each in (memory_command, recover_command)
}
COMMANDS = {
    name: [o for action in parser._actions for o in action.option_strings if o != "-h"]
    for name, parser in PARSERS.items()
}
ENVIRONMENTS = st.dictionaries(
    st.sampled_from([*(f"APOLLO_{n}".upper() for n in Settings.model_fields), "HOME", "TMPDIR"])
    | st.text("ABCDEFGHIKLMNOPRSTUVWXYZ_", max_size=12).map("APOLLO_{}".format),
    hostile.ANY,
    max_size=3,
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    first = draw(st.sampled_from(["", "", "", *COMMANDS]))
    words = [first] if first else []
    for flag in draw(st.lists(st.sampled_from(COMMANDS.get(first, FLAGS)), max_size=3)):
        value = draw(hostile.ANY)
        words += draw(st.sampled_from([[flag, value], [f"{flag}={value}"], [flag]]))
    return words + [draw(hostile.ANY) for _ in range(draw(st.integers(0, 1)) if first else 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the server runs, by a path that is short enough for its sockets."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("any")
    hostile.make_files(folder)
    (folder / "state").mkdir(mode=0o700)
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def ending_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that serves is sent SIGTERM as soon as it listens for it."""

    async def serve(chosen: Settings) -> None:
        loop = asyncio.get_running_loop()
        server = server_module.TrainingServer(chosen)
        loop.call_soon(os.kill, os.getpid(), signal.SIGTERM)
        await server.serve()

    monkeypatch.setattr(server_module, "_serve", serve)
    monkeypatch.setattr(server_module, "_set_imports_aside", lambda: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


def run(words: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit status, and what was said."""
    environment = {name: hostile.as_arguments(value) for name, value in environment.items()}
    with hostile.streams("ascii", environment) as told, pytest.raises(SystemExit) as ended:
        server_module.main([hostile.as_arguments(word) for word in words])
        raise SystemExit(0)
    return ended.value.code or 0, b"".join(s.getvalue() for s in told).decode()


def test_any_command_line_ends_with_a_documented_status(folder: Path) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(command_lines(), ENVIRONMENTS)
    def ends(words: list[str], environment: dict[str, str]) -> None:
        status, told = run(words, {"APOLLO_STATE_DIR": "state"} | environment)
        assert status in STATUSES
        assert "Traceback" not in told
        assert told.strip() or not status

    ends()


@pytest.mark.long
@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_with_every_value(folder: Path, flag: str) -> None:
    for value in hostile.VALUES:
        status, told = run([f"{flag}={value}"], {"APOLLO_STATE_DIR": "state"})
        assert status in STATUSES, (flag, value, told)
        assert "Traceback" not in told
        assert told.strip() or not status, (flag, value)
