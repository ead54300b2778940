"""100 kills of the training server at random instants: `make soak`; `SOAK_KILLS` says how many."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.server_process import served
from tests.soak.kill_server import SETTINGS, kill_again_and_again, require_nothing_lost, summary
from tests.soak.real_vllm import served_by_vllm

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("SOAK_KILLS", "100"))
SEED = 5


def test_no_kill_loses_a_run_an_event_or_a_step(tiny_model: Path) -> None:
    outcome = kill_again_and_again(served(tiny_model, **SETTINGS), KILLS, SEED)
    print(f"{KILLS} kills: {summary(outcome)}")
    require_nothing_lost(outcome)
    assert outcome.optimizer_step > KILLS


def test_no_kill_beside_a_real_vllm_loses_a_run_an_event_or_a_step(tmp_path: Path) -> None:
    outcome = kill_again_and_again(served_by_vllm(tmp_path, **SETTINGS), KILLS, SEED)
    print(f"{KILLS} kills beside vLLM: {summary(outcome)}")
    require_nothing_lost(outcome)
    assert outcome.optimizer_step > KILLS
