"""A model in wider floats is that model with all its weights widened, without holding them all."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, Mamba2Config, Qwen3MoeConfig

from apollo_trainer.weights import widened
from apollo_trainer.weights.verify import log_probabilities
from apollo_trainer.weights.widened import Widened
from examples.byte_model import random_model

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
}
CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, sliding_window=16),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
MAMBA = Mamba2Config(
    vocab_size=259,
    hidden_size=32,
    num_hidden_layers=2,
    state_size=8,
    num_heads=2,
    head_dim=32,
    n_groups=1,
    chunk_size=16,
)
TOKENS = list(range(5, 45))


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param], seed=5, dtype=torch.bfloat16).eval()


def test_it_is_the_model_of_widened_weights(model):
    narrow = log_probabilities(model, TOKENS)
    with Widened(torch.float32):
        wide = log_probabilities(model, TOKENS)
    expected = log_probabilities(model.float(), TOKENS)
    torch.testing.assert_close(wide, expected, rtol=0, atol=2e-6)
    assert (narrow - expected).abs().max() > 1e-3, "otherwise nothing was rounded"


def test_the_weights_stay_as_they_are(model):
    before = {name: (p.dtype, p.clone()) for name, p in model.named_parameters()}
    with Widened(torch.float32):
        log_probabilities(model, TOKENS)
    for name, parameter in model.named_parameters():
        dtype, values = before[name]
        assert parameter.dtype is dtype
        assert torch.equal(parameter, values)


def test_a_large_matrix_is_widened_in_parts(monkeypatch):
    model = random_model(CONFIGS["gemma2"], seed=5, dtype=torch.bfloat16).eval()
    with Widened(torch.float32):
        whole = log_probabilities(model, TOKENS)
    monkeypatch.setattr(widened, "CHUNK_ELEMENTS", 256)
    with Widened(torch.float32):
        parts = log_probabilities(model, TOKENS)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIGS["gpt2"], MAMBA], ids=["gpt2", "mamba2"])
def test_float32_is_measured_in_float64(config):
    model = random_model(config, seed=5, dtype=torch.float32).eval()
    with Widened(torch.float64):
        wide = log_probabilities(model, TOKENS)
    expected = log_probabilities(model.double(), TOKENS)
    torch.testing.assert_close(wide.float(), expected, rtol=0, atol=1e-6)
