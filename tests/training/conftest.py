"""Tiny seeded models, in fp32 and on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from apollo_trainer.training.delta_rule import choose_delta_rule

# Wider than the default, so that losses differ by more than rounding does.
SHARED = {"vocab_size": 259, "initializer_range": 0.2, "eos_token_id": 0, "bos_token_id": None}
ATTENTION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
# Of four layers: both kinds, and shorter than the contexts of the tests.
SLIDING = {"sliding_window": 6}
HYBRID = {name: value for name, value in ATTENTION.items() if name != "head_dim"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**SHARED, **ATTENTION, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: OPTConfig(
        **SHARED,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        pad_token_id=1,
    ),
    "bloom": lambda: BloomConfig(**SHARED, hidden_size=32, n_layer=2, n_head=4),
    "mistral": lambda: MistralConfig(**SHARED, **ATTENTION, **SLIDING),
    "gemma2": lambda: Gemma2Config(
        **SHARED, **ATTENTION | {"num_hidden_layers": 4}, **SLIDING, pad_token_id=0
    ),
    # A cap that bends the scores of so small a model, and that its own code alone knows of.
    "gemma2_capped": lambda: Gemma2Config(
        **SHARED,
        **ATTENTION | {"num_hidden_layers": 4},
        **SLIDING,
        pad_token_id=0,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SHARED,
        **ATTENTION | {"num_hidden_layers": 4},
        **SLIDING,
        pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "qwen2": lambda: Qwen2Config(
        **SHARED,
        **HYBRID | {"num_hidden_layers": 4},
        **SLIDING,
        use_sliding_window=True,
        max_window_layers=2,
    ),
    # Sinks and windows. Each token goes to all experts: rounding sends none to another.
    "gpt_oss": lambda: GptOssConfig(
        **SHARED,
        **ATTENTION | {"num_hidden_layers": 4},
        **EXPERTS | {"num_experts_per_tok": 4},
        **SLIDING,
        num_local_experts=4,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # Chunks, and every second layer without positions.
    "llama4": lambda: Llama4TextConfig(
        **SHARED,
        **ATTENTION | {"num_hidden_layers": 4},
        **EXPERTS,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=48,
        attention_chunk_size=6,
        no_rope_layers=[1, 0, 1, 0],
        pad_token_id=0,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHARED, **ATTENTION, **EXPERTS, num_experts=4, moe_intermediate_size=16
    ),
    "mixtral": lambda: MixtralConfig(**SHARED, **ATTENTION, **EXPERTS, num_local_experts=4),
    "qwen3_next": lambda: Qwen3NextConfig(
        **SHARED,
        **ATTENTION,
        **EXPERTS,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    # Its cache is an argument of another name, without keys and values.
    "mamba2": lambda: Mamba2Config(
        **SHARED | {"bos_token_id": 0},
        pad_token_id=0,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
    ),
    "jamba": lambda: JambaConfig(
        **SHARED,
        **HYBRID,
        num_experts=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], Any]:
    """A new model of a family, with the same values each time."""

    def make(family: str) -> Any:
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]()).float().eval()
        # Where flash-linear-attention is installed, transformers takes it, right or not.
        choose_delta_rule(model)
        return model

    return make
