"""What the command says and how it ends, where no model is needed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from apollo_client import ApolloClient

APOLLO = str(Path(sys.executable).with_name("apollo"))


def apollo(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [APOLLO, *arguments], capture_output=True, text=True, timeout=60, **options
    )


def test_the_version_is_the_distributions():
    assert apollo("--version").stdout == f"apollo {version('apollo-grpc')}\n"


def test_help_names_every_command():
    told = apollo("--help").stdout
    assert all(name in told for name in ("train", "status", "watch", "sync", "up"))


@pytest.mark.parametrize("command", ["status", "watch", "sync"])
def test_without_a_server_the_status_is_3_and_the_words_say_what_to_start(state_dir, command):
    done = apollo(command, env={"APOLLO_STATE_DIR": str(state_dir)})
    assert done.returncode == 3
    assert "apollo up MODEL" in done.stderr and str(state_dir) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_cannot_be_read_is_told_before_any_call(state_dir):
    done = apollo("train", "none.jsonl", env={"APOLLO_STATE_DIR": str(state_dir)})
    assert done.returncode == 2
    assert "none.jsonl" in done.stderr


def test_a_token_file_that_cannot_be_read_is_told(state_dir):
    done = apollo("--address", "localhost:1", "--token-file", str(state_dir / "no"), "status")
    assert done.returncode == 2
    assert "--token-file" in done.stderr


def test_a_reader_that_leaves_is_no_error(server):
    command = f"{APOLLO} --address {server} watch --json | head -n 1"
    with subprocess.Popen(
        command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as pipe:
        assert '"status"' in pipe.stdout.readline()
        with ApolloClient(server) as client:
            list(client.train([("a", "b")]))
        assert pipe.wait(20) == 0
        assert pipe.stderr.read() == ""
