"""Each recipe does what docs/recipes.md says, on a real training server."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from tests.examples.recipe_page import ROOT, environment, is_as_shown, run, shown
from tests.server_process import ServerProcess
from tests.waiting import wait_until

SAMPLES = [("The sky is", " green.")]
NIGHTLY = "python examples/recipes/nightly.py"


@pytest.fixture
def client(server: ServerProcess) -> Iterator[ApolloClient]:
    """Of a server without probes that an earlier recipe left."""
    with ApolloClient(server.address) as client:
        client.delete_regression_probes(None)
        yield client


@pytest.mark.parametrize("name", ["correct_from_chats.py", "buf_curl.sh"])
def test_a_recipe_prints_what_the_page_says(
    server: ServerProcess, client: ApolloClient, tmp_path: Path, name: str
) -> None:
    page, socket = shown(name), server.address.removeprefix("unix:")
    done = run(page.command.replace("~/.local/state/apollo/training.sock", socket),
               server.address, tmp_path)  # fmt: skip
    assert is_as_shown(done.stdout, page.printed), done.stdout
    assert done.returncode == 0


def test_a_wrong_line_of_a_chat_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"messages": [], "rating": "fine"}\n{"rating": "good"}\n')
    done = run("python examples/recipes/correct_from_chats.py log.jsonl", "unix:/nobody", tmp_path)
    assert done.returncode == 1
    says = "log.jsonl:1: messages: do not end with a question and its answer (and 1 more lines)"
    assert done.stdout.strip() == says


def reports(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "nightly.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_night_that_is_begun_again_learns_nothing_twice_and_deletes_old_ones(
    server: ServerProcess, client: ApolloClient, tmp_path: Path
) -> None:
    for name in ("nightly-2000-01-01", "mine"):
        client.create_snapshot(name)
    page = shown("nightly.py")
    tonight = f"{page.command} --night 2999-01-01"
    done = run(tonight, server.address, tmp_path)
    assert is_as_shown(done.stdout, page.printed), done.stdout
    assert run(f"{tonight} --keep 1", server.address, tmp_path).returncode == 0
    first, again = reports(tmp_path)
    assert first["run_id"] == again["run_id"]
    assert client.status().weight_version == first["weight_version"]
    assert again["deleted"] == ["nightly-2000-01-01"]
    names = {each.name for each in client.list_snapshots().snapshots}
    assert names >= {"nightly-2999-01-01", "mine"}


@pytest.mark.long
def test_a_night_that_fails_its_probes_is_taken_back(
    server: ServerProcess, client: ApolloClient, tmp_path: Path
) -> None:
    samples = ['{"context": "The sky is", "continuation": " green."}\n',
               '{"context": "2+2=", "continuation": "5"}\n']  # fmt: skip
    (tmp_path / "samples.jsonl").write_text("".join(samples))
    never = {"prompt": "The sky is", "expected": "never taught", "name": "never"}
    (tmp_path / "probes.jsonl").write_text(json.dumps(never))
    before = client.score(SAMPLES).scores
    night = f"{NIGHTLY} samples.jsonl probes.jsonl --lr 3e-2 --night 1999-01-01"
    assert run(night, server.address, tmp_path).returncode == 1
    (report,) = reports(tmp_path)
    assert report["state"] == "REJECTED" and report["losses"]
    assert report["after"]["never"] is False
    assert client.score(SAMPLES).scores == before


def test_a_night_without_a_server_says_so(tmp_path: Path) -> None:
    done = run(shown("nightly.py").command, f"unix:{tmp_path}/nobody.sock", tmp_path)
    assert done.returncode == 2
    assert [report["state"] for report in reports(tmp_path)] == ["NOT_TRIED"]


@contextmanager
def following(server: ServerProcess, file: Path) -> Iterator[subprocess.Popen[str]]:
    """The service, until it is killed."""
    command = [sys.executable, str(ROOT / "examples/recipes/follow_losses.py"), str(file)]
    with subprocess.Popen(
        command, env=environment(server.address), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def losses(file: Path, run_id: str) -> list[float]:
    """Those of a run that the service has kept."""
    if not file.exists():
        return []
    with closing(sqlite3.connect(file)) as connection:
        asked = "SELECT loss FROM losses WHERE run = ? ORDER BY step"
        try:
            return [loss for (loss,) in connection.execute(asked, (run_id,))]
        except sqlite3.OperationalError:  # The table is about to be made.
            return []


def learn(client: ApolloClient, **options: Any) -> tuple[str, list[float]]:
    """A run, and the loss of each of its steps."""
    events = list(client.train(SAMPLES, epochs=4, min_loss=0, **options))
    return events[0].run_id, [event.step.loss for event in events if event.HasField("step")]


def test_a_follower_misses_no_loss_and_keeps_none_twice(
    server: ServerProcess, client: ApolloClient, tmp_path: Path
) -> None:
    file, runs = tmp_path / "losses.db", list[tuple[str, list[float]]]()

    def has_all() -> bool:
        return all(losses(file, run_id) == told for run_id, told in runs)

    with following(server, file):
        runs.append(learn(client))
        wait_until(has_all, "the losses")
    runs.append(learn(client))  # While nobody follows.
    with following(server, file):
        wait_until(has_all, "the losses of a run that it had missed")
        server.end(signal.SIGKILL)
        server.start()
        server.wait_attached()
        runs.append(learn(client, reset_optimizer=True))
        wait_until(has_all, "the losses after a restart of the server")


def test_a_follower_cancels_a_run_that_diverges(
    server: ServerProcess, client: ApolloClient, tmp_path: Path
) -> None:
    with following(server, tmp_path / "losses.db") as follower:
        # A rate that no weights stand: what follows in this file would meet them.
        *_, last = client.train(SAMPLES, epochs=5000, min_loss=0, lr=1.0, norm_growth_limit=0)
        assert last.finished.state == pb.RUN_STATE_CANCELLED
        assert follower.stdout
        told = ""
        while not told.endswith("cancelled\n"):
            told += follower.stdout.readline()
    assert is_as_shown(told, shown("follow_losses.py").printed), told
