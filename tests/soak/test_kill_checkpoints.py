"""Kills amid sync, snapshot, restore and undo beside a real vLLM: `make soak`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.soak.kill_checkpoints import OPERATIONS, kill_again_and_again
from tests.soak.real_vllm import served_by_vllm
from tests.vllm.conftest import Stack

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("SOAK_KILLS", "100"))
LOADED_EVERY = 10
SEED = 6


def test_no_kill_leaves_a_directory_that_does_not_load(tmp_path: Path) -> None:
    model = tmp_path / "model"

    def load(number: int) -> None:
        """By another vLLM, without the plugin."""
        if (number + 1) % LOADED_EVERY:
            return
        other = Stack(tmp_path / f"other-{number}", "qwen3", model=model)
        other.start_vllm(plugins="")
        other.wait_serving()
        assert other.complete(list(range(60, 80)))["choices"]
        other.end("vllm")

    with served_by_vllm(tmp_path, APOLLO_LEASE_SECONDS="1") as server:
        outcome = kill_again_and_again(server, model, KILLS, SEED, load)
    print(f"{KILLS} kills: {outcome}")
    assert set(outcome.kills) == set(OPERATIONS)
    assert sum(outcome.cut_off.values()) > KILLS // 4
