"""`apollo watch RUN_ID --to`: what it leaves where it is killed, and how it ends."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2
from tests.command_line import apollo
from tests.waiting import wait_until


@contextmanager
def run_amid(client: ApolloClient) -> Iterator[str]:
    """The id of a run that goes on until the block ends."""
    samples = [("The sea is", " deep.")]
    run_id = next(client.train(samples, epochs=100_000, min_loss=0.0)).run_id
    try:
        yield run_id
    finally:
        ended = client.cancel_run(run_id)
    assert ended.state == training_pb2.RUN_STATE_RUNNING


def csv_steps(place: Path) -> list[int]:
    return [int(row["step"]) for row in csv.DictReader(place.read_text().splitlines())]


def tensorboard_steps(place: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = place.iterdir()
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    return [event.step for event in reader.Reload().Scalars("loss")]


def size(place: Path) -> int:
    """Of what a sink has written."""
    files = [place] if place.is_file() else place.rglob("*tfevents*")
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("kind", "steps"), [("csv", csv_steps), ("tensorboard", tensorboard_steps)]
)
def test_a_sink_that_is_killed_amid_a_run_leaves_no_gap_and_no_repeat(
    server: str, tmp_path: Path, kind: str, steps: Callable[[Path], list[int]]
) -> None:
    place = tmp_path / "place"
    with ApolloClient(server) as client:
        with run_amid(client) as run_id:
            words = ["--address", server, "watch", run_id, "--to", f"{kind}:{place}"]
            command = [sys.executable, "-m", "apollo_client.command", *words]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sink:
                wait_until(lambda: size(place) > 3000, "the figures")
                sink.kill()
        *_, last = client.watch_run(run_id)
    done = apollo(*words)
    assert (done.returncode, "cancelled" in done.stdout) == (1, True), done.stderr
    every = list(range(1, last.finished.steps_done + 1))
    assert steps(place) == every
    # Nothing is left to be written, and the end is told again.
    again = apollo(*words, "--json")
    assert (again.returncode, '"finished"' in again.stdout) == (1, True)
    assert steps(place) == every


def test_nothing_is_made_for_a_run_that_is_not_known_or_not_named(
    server: str, tmp_path: Path
) -> None:
    target = f"csv:{tmp_path / 'run.csv'}"
    for words, status, told in (
        (["none", "--to", target], 1, "apollo runs"),
        (["--to", target], 2, "RUN_ID"),
        (["none", "--after", "3", "--to", target], 2, "--after"),
        (["none", "--to", "xlsx:run"], 2, "csv:FILE"),
    ):
        done = apollo("--address", server, "watch", *words)
        assert (done.returncode, told in done.stderr) == (status, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_told_as_ever(state_dir: Path) -> None:
    environment = {"APOLLO_STATE_DIR": str(state_dir)}
    assert apollo("watch", "a", "--to", f"csv:{state_dir}/a.csv", env=environment).returncode == 3


def test_the_readers_end_is_the_runs(server: str, tmp_path: Path) -> None:
    """A run that did not succeed ends the command with 1, and its figures are kept."""
    with ApolloClient(server) as client:
        *_, last = client.train([("a", "b")], epochs=3, max_loss=1e-9)
    place = tmp_path / "run.csv"
    done = apollo("--address", server, "watch", last.run_id, "--to", f"csv:{place}")
    assert (done.returncode, "failed" in done.stdout) == (1, True)
    assert csv_steps(place) == []
    assert list(tmp_path.iterdir()) == [place]


def test_an_empty_id_is_of_no_run_and_not_of_all(server: str) -> None:
    done = apollo("--address", server, "watch", "")
    assert (done.returncode, "run_id" in done.stderr) == (2, True), done.stderr
