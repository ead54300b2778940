"""What the command says and how it ends, where no model is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from apollo_client import ApolloClient
from tests.command_line import apollo

APOLLO = str(Path(sys.executable).with_name("apollo"))


def test_the_installed_command_tells_the_distributions_version():
    done = subprocess.run([APOLLO, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"apollo {version('apollo-grpc')}\n")


def test_help_names_every_command():
    told = apollo("--help").stdout
    assert all(
        name in told for name in ("train", "runs", "run", "cancel", "status", "watch", "sync", "up")
    )


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


def test_runs_are_listed_shown_followed_and_cancelled(server, tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text('{"context": "The sea is", "continuation": " deep."}\n')
    at = ("--address", server)
    trained = apollo(*at, "train", str(file), "--epochs", "3", "--request-id", "r1", "--json")
    assert trained.returncode == 0
    again = apollo(*at, "train", str(file), "--epochs", "3", "--request-id", "r1", "--json")
    assert again.stdout == trained.stdout
    run_id = json.loads(trained.stdout.splitlines()[0])["run_id"]

    listed = apollo(*at, "runs", "--state", "succeeded", "--limit", "1")
    assert listed.stdout.startswith(run_id)
    assert "3/3 steps" in listed.stdout
    assert json.loads(apollo(*at, "runs", "--limit", "1", "--json").stdout)["run_id"] == run_id
    shown = apollo(*at, "run", run_id).stdout
    assert "samples    1" in shown and f"apollo watch {run_id}" in shown
    assert apollo(*at, "watch", run_id, "--json").stdout == trained.stdout
    rest = apollo(*at, "watch", run_id, "--after", "4", "--json").stdout
    assert rest == "".join(trained.stdout.splitlines(keepends=True)[4:])
    assert "succeeded" in apollo(*at, "cancel", run_id).stdout


def test_an_unknown_run_is_told_in_words(server):
    for command in ("run", "watch", "cancel"):
        done = apollo("--address", server, command, "none")
        assert done.returncode == 1
        assert "apollo runs" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["up", "doctor"])
def test_a_model_whose_sync_was_cut_off_is_not_started_and_the_way_out_is_told(tmp_path, command):
    (tmp_path / ".config.json.apollo-aside").write_text("{}")
    environment = {"APOLLO_STATE_DIR": str(tmp_path / "state")}
    done = apollo(command, str(tmp_path), env=environment)
    assert done.returncode == 2
    assert f"apollo-training-server recover {tmp_path}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".config.json.apollo-aside"]


def test_what_has_ended_is_told_to_be_too_late_to_cancel_and_what_never_was_is_not_found(server):
    environment = {"APOLLO_ADDRESS": server}
    synced = apollo("checkpoint", "sync", "--request-id", "mine", env=environment)
    assert synced.returncode == 0, synced.stderr
    ended = apollo("checkpoint", "cancel", "mine", env=environment)
    assert (ended.returncode, ended.stdout) == (1, "mine: too late\n")
    unknown = apollo("checkpoint", "cancel", "another", env=environment)
    assert unknown.returncode == 1
    assert "REQUEST_NOT_FOUND" in unknown.stderr
