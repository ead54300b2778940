"""What the help of all commands calls the same thing, in the same words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from apollo_client.command.app import app

# Of what they stand beside.
OTHERWISE = {"--name", "--request-id", "--state", "--all", "--port", "--anchor-weight", "--seed"}


def commands(command: Any, path: str = "apollo") -> Iterator[tuple[str, Any]]:
    """Every command by its words."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{path} {name}")


COMMANDS = dict(commands(typer.main.get_command(app)))


def helps(kind: str) -> dict[str, set[str]]:
    """Each option or argument by its name, with what is said of it anywhere."""
    found = defaultdict(set)
    for command in COMMANDS.values():
        for each in command.params:
            if each.param_type_name == kind:
                found[each.opts[0] if kind == "option" else each.make_metavar()].add(each.help)
    return found


def test_an_option_of_several_commands_is_explained_in_the_same_words() -> None:
    told = {name: words for name, words in helps("option").items() if name not in OTHERWISE}
    assert {name: words for name, words in told.items() if len(words) > 1} == {}


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_says_what_it_does_and_what_it_takes(path: str) -> None:
    command = COMMANDS[path]
    assert command.help
    assert [each.name for each in command.params if not each.help and each.name != "help"] == []


def test_a_list_is_called_one() -> None:
    lists = [path for path in COMMANDS if path.endswith((" list", " runs", " probes"))]
    assert all(COMMANDS[path].help.startswith("List ") for path in lists)


def test_who_takes_a_run_takes_the_newest() -> None:
    taken = {
        path: {name for each in command.params for name in each.opts}
        for path, command in COMMANDS.items()
        if any(each.name == "run_id" for each in command.params)
    }
    assert len(taken) == 7
    assert all("--last" in names for names in taken.values())
