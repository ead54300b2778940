"""`apollo wait`, and runs that are left at work by Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from tests.command_line import apollo
from tests.waiting import HANG, wait_until

GOING = ("--epochs", "100000", "--min-loss", "0")
LINE = '{"context": "The sea is", "continuation": " deep."}'


@contextmanager
def started(server: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which Ctrl-C can reach."""
    command = [sys.executable, "-m", "apollo_client.command", "--address", server, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        yield process


@contextmanager
def run_amid(client: ApolloClient) -> Iterator[str]:
    """The id of a run that goes on until the block ends."""
    run_id = client.create_run([("The sea is", " deep.")], epochs=100_000, min_loss=0.0).run_id
    yield run_id
    client.cancel_run(run_id)


def is_at_work(client: ApolloClient, run_id: str) -> bool:
    """Whether its steps are taken now."""
    return client.get_run(run_id).state == pb.RUN_STATE_RUNNING


def test_the_end_of_a_run_is_waited_for_and_its_exit_status_is_that_of_the_run(
    server: str,
) -> None:
    with ApolloClient(server) as client:
        with run_amid(client) as run_id, started(server, "wait", run_id, "--json") as waiting:
            wait_until(lambda: is_at_work(client, run_id), "the run")
            client.cancel_run(run_id)
            out, _ = waiting.communicate(timeout=HANG)
        assert (waiting.returncode, json.loads(out)["state"]) == (1, "RUN_STATE_CANCELLED")
        *_, last = client.train([("a", "b")], epochs=2)
    done = apollo("--address", server, "wait", last.run_id)
    assert (done.returncode, "succeeded" in done.stdout) == (0, True)
    failed = apollo("--address", server, "wait", run_id)
    assert (failed.returncode, "cancelled" in failed.stdout) == (1, True)


def left_by_ctrl_c(server: str, *words: str) -> tuple[int, str]:
    """How a command that shows a run ends at Ctrl-C, and what it says then."""
    with started(server, *words) as process:
        assert process.stdout
        for line in process.stdout:
            if "step 1 " in line or '"step"' in line:
                break
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=HANG)
    return process.returncode, told


@pytest.mark.parametrize("command", ["train", "watch"])
def test_ctrl_c_leaves_a_run_at_work_and_says_how_to_come_back(
    server: str, tmp_path: Path, command: str
) -> None:
    (facts := tmp_path / "facts").write_text(LINE)
    with ApolloClient(server) as client:
        if command == "train":
            status, told = left_by_ctrl_c(server, "train", str(facts), *GOING)
        else:
            with run_amid(client) as run_id:
                status, told = left_by_ctrl_c(server, "watch", run_id)
                assert is_at_work(client, run_id)
        run_id = client.list_runs(1).runs[0].run_id
        client.cancel_run(run_id)
    assert status == 130
    assert told == (
        f"\nRun {run_id} goes on; 'apollo watch {run_id}' follows it, "
        f"'apollo cancel {run_id}' ends it.\n"
    )


@pytest.mark.parametrize("words", [["wait"], ["watch"]])
def test_so_it_does_before_anything_was_heard_of_the_run(
    server: str, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def interrupt(*_: object) -> Iterator[pb.RunEvent]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(ApolloClient, "watch_run", interrupt)
    with ApolloClient(server) as client, run_amid(client) as run_id:
        done = apollo("--address", server, *words, run_id)
        assert client.get_run(run_id).state in (pb.RUN_STATE_QUEUED, pb.RUN_STATE_RUNNING)
    assert done.returncode == 130
    assert f"'apollo watch {run_id}' follows it" in done.stderr


def test_a_run_of_which_nothing_was_heard_is_found_in_the_list(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object, **options: object) -> Iterator[pb.RunEvent]:
        raise KeyboardInterrupt
        yield

    (facts := tmp_path / "facts").write_text(LINE)
    monkeypatch.setattr(ApolloClient, "train", interrupt)
    done = apollo("--address", server, "train", str(facts))
    assert (done.returncode, "'apollo runs'" in done.stderr) == (130, True)
