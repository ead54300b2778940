"""Tiny seeded models, in fp32 and on the CPU, and the byte tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from examples.byte_model import byte_tokenizer

# Wider than the default, so that losses differ by more than rounding does.
SHARED = {"vocab_size": 259, "initializer_range": 0.2, "eos_token_id": 0, "bos_token_id": None}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(
        **SHARED,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "gpt2": lambda: GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], Any]:
    """A new model of a family, with the same values each time."""

    def make(family: str) -> Any:
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(CONFIGS[family]()).float().eval()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()
