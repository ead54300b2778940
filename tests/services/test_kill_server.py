"""A few kills of the training server; `make soak` does a hundred."""

from __future__ import annotations

from pathlib import Path

from tests.server_process import served
from tests.soak.kill_server import SETTINGS, kill_again_and_again, require_nothing_lost


def test_three_kills_lose_no_run_no_event_and_no_step(tiny_model: Path) -> None:
    outcome = kill_again_and_again(served(tiny_model, **SETTINGS), kills=3, seed=11)
    require_nothing_lost(outcome)
    assert len(outcome.told) >= 2
    assert outcome.optimizer_step > 0
