"""Kills amid sync, snapshot, restore and undo beside a real vLLM: `make soak`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.soak.kill_checkpoints import OPERATIONS, WRITERS, kill_again_and_again
from tests.soak.other_vllm import other_vllm
from tests.soak.real_vllm import served_by_vllm
from tests.vllm.families import SMALL, Family

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("SOAK_KILLS", "100"))
STARTED_EVERY = 25
SEED = 6
# 49 MiB in float32: each operation takes long enough to be killed anywhere in it.
SIZED = Family(
    "qwen3",
    SMALL
    | {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": False,
    },
)


def test_no_kill_leaves_a_directory_that_does_not_load(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, seen = tmp_path / "model", set[tuple[float, ...]]()
    with (
        served_by_vllm(tmp_path, SIZED, APOLLO_LEASE_SECONDS="1") as server,
        other_vllm(tmp_path / "other", SIZED, model) as kept,
    ):

        def load(number: int) -> None:
            kept.load()
            loaded = kept.require_same_as_transformers()
            seen.add(tuple(loaded.tolist()))
            if number % STARTED_EVERY == 0:
                with other_vllm(tmp_path / f"other-{number}", SIZED, model) as started:
                    assert started.require_same_as_transformers().equal(loaded)

        outcome = kill_again_and_again(server, model, KILLS, SEED, load)
    print(f"{KILLS} kills: {outcome}, {len(seen)} models loaded")
    for name in OPERATIONS:
        assert outcome.cut_off[name] >= outcome.kills[name] / 4, name
    assert sum(outcome.amid.values()) >= KILLS / 4
    # Every fourth kill is aimed at a write to live weights; which of them are mixed is chance.
    assert sum(outcome.amid[name] for name in WRITERS) >= KILLS / 8
    assert len(seen) > KILLS / 2, "not the same one each time"
