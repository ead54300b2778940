"""`apollo plot`: losses as a chart of plain characters."""

from __future__ import annotations

import json

import pytest

from apollo_client import ApolloClient
from apollo_client.command.plot import ROWS, chart
from tests.command_line import apollo


def test_a_loss_that_falls_goes_down_from_left_to_right() -> None:
    lines = chart([4.0, 3.0, 2.0, 1.0], 40, (1, 4))
    assert len(lines) == ROWS + 2
    marks = {line.index("*"): row for row, line in enumerate(lines) if "*" in line}
    assert list(marks) == sorted(marks) and list(marks.values()) == sorted(marks.values())
    assert lines[0].split() == ["4", "|", "*"] and lines[ROWS - 1].split() == ["1", "|", "*"]
    assert lines[-1].split() == ["step", "1", "4"]


@pytest.mark.parametrize("losses", [[2.5], [2.5] * 7])
def test_losses_that_are_one_are_one_row(losses: list[float]) -> None:
    line, *axis = chart(losses, 40, (1, len(losses)))
    assert line.split() == ["2.5", "|", "*" * len(losses)]
    assert len(axis) == 2


def test_of_more_steps_than_columns_each_column_is_a_mean() -> None:
    lines = chart([1.0, 3.0] * 50 + [5.0, 7.0] * 50, 10, (1, 200))
    assert lines[0].split() == ["6", "|", "*****"]
    assert lines[ROWS - 1].split() == ["2", "|", "*****"]
    assert max(map(len, lines)) < 30


def test_a_run_is_drawn_in_the_width_of_the_terminal_and_told_to_programs(server: str) -> None:
    with ApolloClient(server) as client:
        *events, last = client.train([("The sea is", " deep.")], epochs=40, min_loss=0.0)
    losses = [event.step.loss for event in events if event.HasField("step")]
    done = apollo("--address", server, "plot", last.run_id, env={"COLUMNS": "40"})
    assert done.returncode == 0
    assert done.stdout.isascii() and "step 1 " in done.stdout
    title, *lines = done.stdout.splitlines()
    assert last.run_id in title
    assert 30 < max(map(len, lines)) <= 40
    told = json.loads(apollo("--address", server, "plot", last.run_id, "--json").stdout)
    assert told == {"run_id": last.run_id, "steps": list(range(1, 41)), "losses": losses}


def test_a_run_without_a_step_says_so(server: str) -> None:
    with ApolloClient(server) as client:
        *_, last = client.train([("a", "b")], epochs=3, max_loss=1e-9)
    done = apollo("--address", server, "plot", last.run_id)
    assert (done.returncode, done.stdout) == (0, f"run {last.run_id} has no step with a loss\n")
    told = json.loads(apollo("--address", server, "plot", last.run_id, "--json").stdout)
    assert told == {"run_id": last.run_id, "steps": [], "losses": []}
