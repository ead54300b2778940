"""A few kills of the training server; `make soak` does a hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server_process import served
from tests.soak.kill_server import (
    SETTINGS,
    Outcome,
    kill_again_and_again,
    require_nothing_lost,
    require_watched,
)


@pytest.fixture(scope="module")
def outcome(tiny_model: Path) -> Outcome:
    return kill_again_and_again(served(tiny_model, **SETTINGS), kills=3, seed=11)


def test_three_kills_lose_no_run_no_event_and_no_step(outcome: Outcome) -> None:
    require_nothing_lost(outcome)
    assert len(outcome.told) >= 2
    assert outcome.optimizer_step > 0


def test_all_runs_are_watched_over_three_kills_without_a_gap_or_a_repeat(outcome: Outcome) -> None:
    require_watched(outcome)
    assert len({each.event.run_id for each in outcome.watched}) >= 2
