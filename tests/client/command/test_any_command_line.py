"""Whatever stands on the command line or in the environment: a documented status, no traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from apollo_client.command.app import app, main
from tests import hostile

EXAMPLES = int(os.environ.get("SOAK_COMMAND_LINES", "100"))
# Done, refused or failed, wrong input, nobody there, and left by Ctrl-C.
STATUSES = {0, 1, 2, 3, 130}
# Starts another Python; `test_doctor.py` has it.
SLOW = {"--memory-only"}
# Learn, or serve, for as long as they are told to.
UNENDING = {"train", "dashboard"}
VARIABLES = ["ADDRESS", "STATE_DIR", "TOKEN", "TOKEN_FILE", "CA", "CERTIFICATE", "KEY", "SIDECAR"]
OTHERS = ["HOME", "XDG_STATE_HOME", "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "TMPDIR"]


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command by its words, with its options and arguments."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def named(command: Any) -> Any:
    return [p for p in command.params if p.param_type_name == "option" and p.opts[0] not in SLOW]


@st.composite
def options(draw: st.DrawFn, command: Any) -> list[str]:
    """Some options of a command with any values, each as one word or as two."""
    words: list[str] = []
    for option in draw(st.lists(st.sampled_from(named(command)), max_size=3)):
        name = draw(st.sampled_from([*option.opts, *option.secondary_opts]))
        if option.is_flag:
            words.append(name)
        else:
            value = draw(hostile.ANY)
            words += draw(st.sampled_from([[name, value], [f"{name}={value}"]]))
    return words


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    path = draw(st.sampled_from(sorted(COMMANDS)))
    words = draw(options(COMMANDS[()])) if named(COMMANDS[()]) else []
    command = COMMANDS[path]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    count = len(arguments) + draw(st.sampled_from([0, 0, 0, 1]))
    given_ = [draw(hostile.ANY) for _ in range(count)]
    below = draw(options(command)) if path and named(command) else []
    return [*words, *path, *below, *given_]


ENVIRONMENTS = st.dictionaries(
    st.sampled_from([*(f"APOLLO_{name}" for name in VARIABLES), *OTHERS]), hostile.ANY, max_size=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the commands run; nothing of the user's is found."""
    folder, before = tmp_path_factory.mktemp("any"), Path.cwd()
    hostile.make_files(folder)
    os.chdir(folder)
    yield folder
    os.chdir(before)


def run(words: list[str], environment: dict[str, str], encoding: str) -> tuple[int, str]:
    """The exit status, and what was said."""
    words = [hostile.as_arguments(word) for word in words]
    environment = {name: hostile.as_arguments(value) for name, value in environment.items()}
    with hostile.streams(encoding, environment) as told, pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code or 0, b"".join(s.getvalue() for s in told).decode(encoding, "replace")


def test_any_command_line_ends_with_a_documented_status(folder: Path) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(command_lines(), ENVIRONMENTS, st.sampled_from(["utf-8", "ascii", "latin-1"]))
    @example(["watch", "--min-interval", "nan"], {}, "utf-8")
    def ends(words: list[str], environment: dict[str, str], encoding: str) -> None:
        status, told = run(words, {"APOLLO_STATE_DIR": str(folder)} | environment, encoding)
        assert status in STATUSES
        assert "Traceback" not in told
        assert told.strip()

    ends()


def test_any_option_before_a_server_that_answers(folder: Path, server: str) -> None:
    lines = command_lines().filter(lambda words: not UNENDING & set(words))

    @settings(max_examples=EXAMPLES // 3, deadline=None, suppress_health_check=list(HealthCheck))
    @given(lines)
    def ends(words: list[str]) -> None:
        status, told = run(words, {"APOLLO_ADDRESS": server}, "utf-8")
        assert status in STATUSES
        assert "Traceback" not in told and "INTERNAL" not in told

    ends()


CASES = [
    (path, option)
    for path, command in COMMANDS.items()
    for option in command.params
    if not getattr(option, "is_flag", False)
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "option"), CASES, ids=[" ".join([*path, option.name]) for path, option in CASES]
)
def test_every_option_with_every_value(folder: Path, path: tuple[str, ...], option: Any) -> None:
    for value in hostile.VALUES:
        words = [*path, "--", value]
        if option.param_type_name == "option":
            needed = [p for p in COMMANDS[path].params if p.required]
            words = [*path, f"{option.opts[0]}={value}", *("a" for _ in needed)]
            words += ["status"] if not path else []
        status, told = run(words, {"APOLLO_STATE_DIR": str(folder)}, "utf-8")
        assert status in STATUSES, (words, told)
        assert "Traceback" not in told
