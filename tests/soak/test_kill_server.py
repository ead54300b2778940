"""100 kills of the training server at random instants: `make soak`; `SOAK_KILLS` says how many."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.soak.kill_server import kill_again_and_again, require_nothing_lost, summary

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("SOAK_KILLS", "100"))
SEED = 5


def test_no_kill_loses_a_run_an_event_or_a_step(tiny_model: Path) -> None:
    outcome = kill_again_and_again(tiny_model, KILLS, SEED)
    print(f"{KILLS} kills: {summary(outcome)}")
    require_nothing_lost(outcome)
    assert outcome.optimizer_step > KILLS
