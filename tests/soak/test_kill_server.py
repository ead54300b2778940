"""100 kills of the training server at random instants: `make soak`; `SOAK_KILLS` says how many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server_process import ServerProcess, served
from tests.soak.kill_server import SETTINGS, kill_again_and_again, require_nothing_lost, summary
from tests.vllm.conftest import Stack

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("SOAK_KILLS", "100"))
SEED = 5


@contextmanager
def served_by_vllm(folder: Path) -> Iterator[ServerProcess]:
    """An attached server beside a real vLLM."""
    stack = Stack(folder, "qwen3")
    stack.state.mkdir(mode=0o700)
    server = ServerProcess(stack.state, **SETTINGS)
    try:
        stack.start_vllm()
        stack.wait_serving()
        server.start()
        server.wait_attached()
        yield server
    finally:
        if server._process:
            server.end()
        stack.end("vllm")


def test_no_kill_loses_a_run_an_event_or_a_step(tiny_model: Path) -> None:
    outcome = kill_again_and_again(served(tiny_model, **SETTINGS), KILLS, SEED)
    print(f"{KILLS} kills: {summary(outcome)}")
    require_nothing_lost(outcome)
    assert outcome.optimizer_step > KILLS


def test_no_kill_beside_a_real_vllm_loses_a_run_an_event_or_a_step(tmp_path: Path) -> None:
    outcome = kill_again_and_again(served_by_vllm(tmp_path), KILLS, SEED)
    print(f"{KILLS} kills beside vLLM: {summary(outcome)}")
    require_nothing_lost(outcome)
    assert outcome.optimizer_step > KILLS
