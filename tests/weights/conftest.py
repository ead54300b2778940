"""A tiny Qwen3 whose weights lie scattered in one memory, as vLLM keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.live_model import fill_with_views, meta_model


def tiny_config(**changed: Any) -> Qwen3Config:
    fields = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return Qwen3Config(**(fields | changed))


class Live:
    """A model directory, the memory with its weights, and the model over views of it."""

    def __init__(self, directory):
        self.directory = directory
        self.original = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        values = dict(self.original.named_parameters())
        dtype = next(iter(values.values())).dtype
        # A gap before each parameter, so that none begins at the start of the memory.
        self.memory = torch.full((sum(v.numel() + 5 for v in values.values()),), 9.0, dtype=dtype)
        self.views = dict(self._place(values))
        self.model = meta_model(str(directory))
        self.plan = plan_checkpoint(self.model)
        fill_with_views(self.model, self.plan, self.views)

    def _place(self, values):
        end = 0
        for name, value in values.items():
            start, end = end + 5, end + 5 + value.numel()
            self.memory[start:end] = value.detach().reshape(-1)
            yield name, self.memory[start:end].view(value.shape)


@pytest.fixture
def config():
    return tiny_config


@pytest.fixture
def live():
    return Live
