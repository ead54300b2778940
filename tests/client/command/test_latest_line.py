"""The latest news of what lasts: a line of a terminal, and nothing where there is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from apollo_client.command.latest_line import counted, latest_line, progress_line
from apollo_grpc.v1 import checkpoint_pb2


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_news_are_told_to_a_terminal_alone(terminal: bool) -> None:
    written = io.StringIO()
    with latest_line("waiting", Console(file=written, force_terminal=terminal)) as show:
        show("step 3  loss [bold]")
    assert ("step 3  loss [bold]" in written.getvalue()) is terminal
    assert terminal or not written.getvalue()


def test_progress_is_told_in_bytes_and_by_what_is_at_work() -> None:
    progress = checkpoint_pb2.Operation.Progress
    told = progress_line(progress(bytes_done=1500, bytes_total=3000, current="a\x1b[31m"))
    assert told.startswith("1,500 of 3,000 bytes  ") and told.isprintable()
    assert progress_line(progress(bytes_total=1)) == "0 of 1 bytes"


def test_samples_are_counted_as_they_pass() -> None:
    told: list[str] = []
    assert list(counted(range(2500), told.append)) == list(range(2500))
    assert told == ["0 samples sent", "1,000 samples sent", "2,000 samples sent"]
