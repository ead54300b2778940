"""The `apollo` command against the real services, as a user and as a script would call it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import command_line, programs
from tests.waiting import HANG

pytestmark = pytest.mark.vllm
APOLLO = str(Path(sys.executable).with_name("apollo"))
LINE = '{"context": "The gate is", "continuation": " shut."}\n'


def apollo(stack, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return command_line.apollo("--address", stack.address, *arguments, **options)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_text(LINE)
    return path


def test_train_prints_a_line_a_step_where_there_is_no_terminal(qwen3, file):
    done = apollo(qwen3, "train", str(file), "--epochs", "4", "--lr", "1e-3")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == list("1234")
    assert lines[-1].startswith("succeeded: 4 steps")


def test_json_events_are_those_of_the_contract(qwen3, file):
    done = apollo(qwen3, "train", "-", "--json", input=LINE * 3)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
    assert sum("step" in event for event in events) == 3
    assert events[-1]["finished"]["state"] == "RUN_STATE_SUCCEEDED"


def test_a_wrong_line_ends_with_status_2_and_says_which(qwen3, file):
    file.write_text(LINE + "\n" + '{"context": "a", "continuatoin": "b"}\n')
    done = apollo(qwen3, "train", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{file}:3: continuatoin" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refusal_of_the_servers_ends_with_status_2_and_its_words(qwen3, file):
    done = apollo(qwen3, "train", str(file), "--lr", "nan")
    assert done.returncode == 2
    assert "spec.optimizer.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_leaves_the_run_going(qwen3, file):
    command = [APOLLO, "--address", qwen3.address, "train", str(file), "--epochs", "5000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not process.stdout.readline().startswith("step"):
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 130
        told = process.stderr.read()
    run_id = qwen3.client.status().active_run_id
    assert run_id, "the run is still at work"
    assert f"Run {run_id} goes on" in told
    qwen3.client.cancel_run(run_id)
    qwen3.wait_for(lambda: not qwen3.client.status().active_run_id, "the end of the run")


def test_watch_follows_every_step_of_somebody_elses_run(qwen3, file):
    with subprocess.Popen(
        [APOLLO, "--address", qwen3.address, "watch", "--json"], stdout=subprocess.PIPE, text=True
    ) as watcher:
        first = json.loads(watcher.stdout.readline())
        events = list(qwen3.client.train([("a", "bc")], epochs=5))
        seen = []
        while not (seen and "finished" in seen[-1]):
            update = json.loads(watcher.stdout.readline())
            seen += [update["event"]] if "event" in update else []
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(HANG) == 0
    assert first["status"]["attachment"] == "ATTACHMENT_STATE_ATTACHED"
    assert [int(event["sequence"]) for event in seen] == [event.sequence for event in events]
    losses = [event["step"]["loss"] for event in seen if "step" in event]
    assert losses == [event.step.loss for event in events if event.HasField("step")]


def test_status_and_sync_say_what_is_and_what_was_done(qwen3, file):
    status = apollo(qwen3, "status")
    assert status.returncode == 0
    assert "attached" in status.stdout and " 0 copied" in status.stdout
    apollo(qwen3, "train", str(file), "--lr", "1e-2")
    first, second = apollo(qwen3, "sync"), apollo(qwen3, "sync")
    assert "wrote model.safetensors" in first.stdout
    assert "nothing had changed" in second.stdout


def test_up_starts_both_and_ends_both(tmp_path_factory, qwen3):
    state = tmp_path_factory.mktemp("u") / "state"
    command = [APOLLO, "up", str(qwen3.model), "--port", str(qwen3.free_port())]
    with subprocess.Popen(
        [*command, "--enforce-eager", "--dtype", "float32", "--max-model-len", "256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=programs.forking(qwen3.environment | {"APOLLO_STATE_DIR": str(state)}),
    ) as up:
        lines = []
        while not (lines and "ready:" in lines[-1]):
            lines.append(up.stdout.readline())
            assert lines[-1], "".join(lines[-40:])
        up.send_signal(signal.SIGINT)
        lines += up.stdout.readlines()
        assert up.wait(HANG) == 0
    assert all(line.startswith(("vllm    |", "trainer |", "apollo  |")) for line in lines)
    assert lines[-1].strip() == "apollo  | stopped"


@pytest.mark.long
def test_up_alone_is_eager_and_leaves_memory_for_training(tmp_path_factory, qwen3):
    state = tmp_path_factory.mktemp("u") / "state"
    environment = programs.forking(qwen3.environment | {"APOLLO_STATE_DIR": str(state)})
    del environment["VLLM_CPU_KVCACHE_SPACE"]
    command = [APOLLO, "up", str(qwen3.model), "--port", str(qwen3.free_port())]
    with subprocess.Popen(
        [*command, "--max-model-len", "256", "--dtype", "float32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as up:
        lines = [up.stdout.readline()]
        said = re.search(r"a KV cache of ([1-4]) GiB of [\d.]+ GiB free", lines[0])
        assert said and "--no-enforce-eager" in lines[0], lines[0]
        while "ready:" not in lines[-1]:
            lines.append(up.stdout.readline())
            assert lines[-1], "".join(lines[-40:])
        up.send_signal(signal.SIGINT)
        up.stdout.read()
        assert up.wait(HANG) == 0
    log = "".join(lines)
    assert f"Explicitly set ({said[1]}.0/" in log
    assert "Enforce eager set" in log


@pytest.mark.long
def test_up_tells_the_error_of_a_vllm_that_does_not_start(tmp_path_factory, qwen3):
    environment = qwen3.environment | {"APOLLO_STATE_DIR": str(tmp_path_factory.mktemp("u") / "s")}
    done = subprocess.run(
        [APOLLO, "up", str(qwen3.model), "--port", str(qwen3.free_port()), "--no-such-flag"],
        env=programs.forking(environment),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 1
    told = [line.strip() for line in done.stdout.splitlines() if line.startswith("apollo  |")]
    assert told[-3:] == [
        "apollo  | vllm ended by itself with status 2:",
        "apollo  |   api_server.py: error: unrecognized arguments: --no-such-flag",
        "apollo  |   What follows MODEL goes to vLLM: 'vllm serve --help=all' lists its options.",
    ]


def test_up_says_what_is_missing_before_it_starts_anything(tmp_path, qwen3):
    done = apollo(qwen3, "up", str(tmp_path))
    assert done.returncode == 2
    assert "config.json" in done.stderr
