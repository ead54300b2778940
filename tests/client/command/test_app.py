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
from tests.waiting import HANG

APOLLO = str(Path(sys.executable).with_name("apollo"))


def jsonl(values: list[object]) -> tuple[str, list[int]]:
    """A file of lines with empty ones between, and the line of each value."""
    lines = range(1, 2 * len(values), 2)
    return "\n\n".join(json.dumps(value) for value in values), list(lines)


def indented(values: list[object]) -> tuple[str, list[int]]:
    """One array over many lines, and the line where each value begins."""
    text = json.dumps(values, indent=1)
    return text, [n for n, line in enumerate(text.splitlines(), 1) if line == " {"]


def test_the_installed_command_tells_the_distributions_version():
    done = subprocess.run([APOLLO, "--version"], capture_output=True, text=True, timeout=HANG)
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


TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "weight": 1},
    {"role": "assistant", "content": "c"},
]
WRONG_ROLE = [{"role": "user", "content": "a"}, {"role": "Assistant", "content": "b"}]


@pytest.mark.parametrize("write", [jsonl, indented], ids=["lines", "array"])
def test_what_the_server_refuses_is_told_by_the_line_of_the_users_file(server, tmp_path, write):
    values = [{"messages": TALK}, {"messages": WRONG_ROLE}, {"context": "a", "continuation": ""}]
    text, lines = write(values)
    (file := tmp_path / "facts.jsonl").write_text(text)
    done = apollo("--address", server, "train", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith(f"apollo: {file}:{lines[1]}: messages")
    assert f"{file}:{lines[2]}: continuation" in done.stderr
    assert "spec." not in done.stderr
    piped = apollo("--address", server, "train", "-", input=text)
    assert piped.stderr == done.stderr.replace(str(file), "stdin")


def test_a_file_larger_than_a_request_is_told_before_any_call(state_dir, tmp_path):
    line = json.dumps({"context": "a" * 2**20, "continuation": "b"}) + "\n"
    (file := tmp_path / "facts.jsonl").write_text(line * 70)
    (few := tmp_path / "few.jsonl").write_text('{"context": "a", "continuation": "b"}')
    anchored = ["train", str(few), "--anchors", str(file)]
    done = apollo(*anchored, env={"APOLLO_STATE_DIR": str(state_dir)})
    assert done.returncode == 2
    assert f"{file}: holds 70.0 MiB of samples; a run takes at most 63.9 MiB" in done.stderr
    assert f"up to {file}:63 they fit: leave out the rest" in done.stderr


@pytest.mark.parametrize("standard_input", ["<&-", "</dev/null", "</proc/self/mem"])
def test_standard_input_without_samples_is_told_in_one_line(state_dir, standard_input):
    command = f"APOLLO_STATE_DIR={state_dir} exec {APOLLO} train - {standard_input}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("apollo: stdin: ")


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
        assert pipe.wait(HANG) == 0
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
    assert "last loss" in shown and f"apollo watch {run_id}" in shown
    with_samples = json.loads(apollo(*at, "run", run_id, "--samples").stdout)
    assert with_samples["spec"]["samples"][0]["text"]["continuation"] == " deep."
    assert apollo(*at, "watch", run_id, "--json").stdout == trained.stdout
    rest = apollo(*at, "watch", run_id, "--after", "4", "--json").stdout
    assert rest == "".join(trained.stdout.splitlines(keepends=True)[4:])
    assert "succeeded" in apollo(*at, "cancel", run_id).stdout


def test_runs_have_names_and_labels_are_watched_together_and_deleted(server, tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text('{"context": "The sea is", "continuation": " deep."}\n')
    at = ("--address", server)
    named = ("--name", "mine", "--label", "team=a b", "--label", "empty=")
    trained = apollo(*at, "train", str(file), *named, "--json")
    run_id = json.loads(trained.stdout.splitlines()[0])["run_id"]
    listed = apollo(*at, "runs", "--name", "mine", "--label", "team=a b", "--oldest-first")
    assert listed.stdout.startswith(run_id) and "mine" in listed.stdout
    assert not apollo(*at, "runs", "--label", "team=b").stdout
    assert "empty=, team=a b" in apollo(*at, "run", run_id).stdout
    refused = apollo(*at, "runs", "--label", "team")
    assert refused.returncode == 2 and "KEY=VALUE" in refused.stderr
    told = all_runs(server, "--after", "0", lines=1)
    revision = int(told.split()[0])
    assert all_runs(server, "--after", f"{revision}", "--json", lines=1) != told
    assert apollo(*at, "delete", run_id).stdout == f"deleted {run_id}\n"
    assert not apollo(*at, "runs", "--name", "mine").stdout


def all_runs(server: str, *options: str, lines: int) -> str:
    """What `apollo watch --all` tells first."""
    words = " ".join(options)
    command = f"{APOLLO} --address {server} watch --all {words} | head -n {lines}"
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, text=True) as pipe:
        told = pipe.stdout.readline()
        # The command notices that nobody reads when it has more to say.
        with ApolloClient(server) as client:
            list(client.train([("a", "b")]))
        assert pipe.wait(HANG) == 0
    return told


def test_an_unknown_run_is_told_in_words(server):
    for command in ("run", "watch", "cancel", "delete"):
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
    assert "OPERATION_NOT_FOUND" in unknown.stderr
