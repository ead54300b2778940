"""`apollo config`: which address and token are used, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import apollo

NOBODY = "localhost:1"


def told(*words: str, **environment: str) -> dict[str, Any]:
    done = apollo(*words, "config", "--json", env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) is found["server"]["answers"]
    return found


def test_a_server_that_answers_is_told_with_its_version_and_its_engine(server: str) -> None:
    found = told("--address", server)
    assert found["address"] == {"value": server, "source": "--address"}
    assert found["token_file"]["source"] == "unused: a socket needs no token"
    assert found["server"]["engine"] == "attached" and found["server"]["version"]
    done = apollo("config", env={"APOLLO_ADDRESS": server})
    assert done.returncode == 0
    assert f"address      {server}  (APOLLO_ADDRESS)" in done.stdout.splitlines()


def test_where_nobody_answers_everything_is_told_all_the_same(state_dir: Path) -> None:
    done = apollo("config", env={"APOLLO_STATE_DIR": str(state_dir)})
    assert done.returncode == 3
    assert f"unix:{state_dir}/training.sock  (default)" in done.stdout
    assert f"{state_dir}  (APOLLO_STATE_DIR)" in done.stdout
    assert done.stdout.endswith("no answer\n")
    assert "apollo up MODEL" in done.stderr


@pytest.mark.parametrize(
    ("words", "environment", "value", "source"),
    [
        (["--token-file", "a"], {"TOKEN_FILE": "b", "TOKEN": "c"}, "a", "--token-file"),
        ([], {"TOKEN_FILE": "b", "TOKEN": "c"}, "b", "APOLLO_TOKEN_FILE"),
        ([], {"TOKEN": "c"}, None, "APOLLO_TOKEN"),
        ([], {}, "{own}", "default"),
    ],
)
def test_the_token_is_that_of_the_option_then_of_variables_then_ones_own(
    state_dir: Path, words: list[str], environment: dict[str, str], value: str, source: str
) -> None:
    (own := state_dir / "token").write_text("secret-word")
    variables = {"STATE_DIR": str(state_dir)} | environment
    named = {f"APOLLO_{name}": value for name, value in variables.items()}
    found = told("--address", NOBODY, *words, **named)
    expected = value.format(own=own) if value else None
    assert found["token_file"] == {"value": expected, "source": source}
    assert "secret-word" not in json.dumps(found)


def test_ones_own_token_is_for_no_other_machine(state_dir: Path) -> None:
    (state_dir / "token").write_text("secret-word")
    found = told("--address", "192.0.2.1:1", "--ca", "none.pem", APOLLO_STATE_DIR=str(state_dir))
    assert found["token_file"]["value"] is None
    assert found["ca"] == {"value": "none.pem", "source": "--ca"}


def test_a_token_file_that_cannot_be_read_is_told_beside_the_rest(state_dir: Path) -> None:
    environment = {"APOLLO_STATE_DIR": str(state_dir)}
    done = apollo("--address", NOBODY, "--token-file", "none", "config", env=environment)
    assert (done.returncode, "--token-file" in done.stderr) == (2, True)
    assert "none  (--token-file)" in done.stdout
