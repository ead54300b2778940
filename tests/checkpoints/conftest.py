"""Model directories on disk, and the live parameters that belong to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.live_model import meta_model

SHARED = {"vocab_size": 64, "eos_token_id": 0, "bos_token_id": None}
SMALL = SHARED | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "tied": lambda: Qwen3Config(**SMALL, tie_word_embeddings=True),
    "untied": lambda: Qwen3Config(**SMALL, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


class LiveDirectory:
    """A saved model, and parameters that hold its values in memory of their own.

    Matrices lie transposed in memory, as an engine may keep them.
    """

    def __init__(self, folder: Path, kind: str, shard_size: str):
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).float()
        model.save_pretrained(folder, max_shard_size=shard_size)
        self.folder = folder
        self.plan = plan_checkpoint(meta_model(str(folder)))
        saved = dict(model.named_parameters())
        self.parameters = {name: _transposed(saved[name].detach()) for name in self.plan.roots}
        self.reader = CheckpointReader(self.plan, self.parameters)

    def train(self, *names: str) -> None:
        """Changes the live values of these parameters, or of all."""
        with torch.no_grad():
            for name in names or self.parameters:
                self.parameters[name].add_(0.5)

    def loaded(self) -> dict[str, torch.Tensor]:
        """The directory's values as transformers loads them."""
        return dict(AutoModelForCausalLM.from_pretrained(self.folder).named_parameters())

    def assert_holds_live_values(self) -> None:
        loaded = self.loaded()
        for name, parameter in self.parameters.items():
            torch.testing.assert_close(loaded[name], parameter, rtol=0, atol=0, msg=name)

    def files(self) -> dict[str, tuple[bytes, int, int]]:
        """Content, mode and inode of every file."""
        return {
            path.name: (path.read_bytes(), path.stat().st_mode, path.stat().st_ino)
            for path in self.folder.iterdir()
        }


def _transposed(values: torch.Tensor) -> torch.nn.Parameter:
    if values.ndim != 2:
        return torch.nn.Parameter(values.clone())
    memory = torch.empty(values.shape[::-1]).T
    return torch.nn.Parameter(memory.copy_(values))


@pytest.fixture
def live_directory(tmp_path: Path) -> Callable[..., LiveDirectory]:
    """A model directory of a kind: "tied", "untied" or "gpt2"."""

    def make(kind: str, *, shard_size: str = "1GB") -> LiveDirectory:
        return LiveDirectory(tmp_path / "model", kind, shard_size)

    return make
