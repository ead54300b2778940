"""The tiny model of each family: what the tests and the sweep of `make models` write and serve.

A family is a `model_type` of transformers and the fields that make it small. The weights are
random and seeded, in all of them by the same few lines, with a vocabulary of 259 bytes and marks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from examples.byte_model import random_model, save_model

SEED = 7
# Wider than the default, so that log-probabilities differ by nats and a wrong map shows.
SHARED = {"vocab_size": 259, "initializer_range": 0.08, "eos_token_id": 0, "bos_token_id": None}
WITHOUT_HEAD_DIM = SHARED | {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SMALL = WITHOUT_HEAD_DIM | {"head_dim": 32}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Some classes index their embedding with the padding token, whose default is a large one.
PADDED = {"pad_token_id": 0, "bos_token_id": 0}
PLAIN, PLAIN_WITHOUT_HEAD_DIM = SMALL | PADDED, WITHOUT_HEAD_DIM | PADDED
ALL_HEADS = PLAIN_WITHOUT_HEAD_DIM | {"num_key_value_heads": 4}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# The sizes that vLLM's latent attention takes.
LATENT = (
    PLAIN_WITHOUT_HEAD_DIM
    | ROUTED
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
)
# With --enforce-eager on a CPU, vLLM 0.32 rotates queries of [T, heads, D] by a kernel that takes
# [T, heads * D]: half a nat from transformers. Its own torch code, as where it compiles, is right.
ROTATED_BY_TORCH = ("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}')
# As DeepSeek's own directories say; vLLM takes another function where none is named.
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# In bfloat16 a router's near ties fall differently on both sides, by half a nat at a token.
EVERY_EXPERT = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
# vLLM's gated delta net on CPU wants linear heads of 128 and bfloat16.
DELTA_NET = {
    "initializer_range": 0.05,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
# Of Mamba 2: transformers lets no step be shorter, and vLLM any (1e-5 nats apart with 1e-3).
SHORTEST_STEP = 1e-6
# On a CPU vLLM 0.32 ends where it would keep a prefix of a Mamba 2 model, sidecar or not.
UNCACHED = ("--no-enable-prefix-caching",)
MAMBA = SHARED | PADDED | {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16}
MAMBA_LAYERS = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_ssm": 256,
    "mamba_chunk_size": 64,
}


@dataclass(frozen=True)
class Family:
    """A tiny model.

    Attributes:
        model_type: transformers' name of the family.
        fields: of its config, over the defaults.
        dtype: of the weights, on disk and served.
        environment: of vLLM.
        arguments: of vLLM, for a model that it does not serve with its defaults.
    """

    model_type: str
    fields: dict[str, Any] = field(default_factory=lambda: PLAIN)
    dtype: str = "float32"
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    @property
    def tolerance_nats(self) -> float:
        """How far log-probabilities of the same weights may be apart on both sides."""
        return {"float32": 1e-4, "bfloat16": 5e-2}[self.dtype]

    def write(self, folder: Path) -> Path:
        """Writes the model directory; the same bytes each time."""
        config = AutoConfig.for_model(self.model_type, **self.fields)
        model = random_model(config, seed=SEED, dtype=getattr(torch, self.dtype))
        vary_constants(model)
        return save_model(folder, model)


@torch.no_grad()
def vary_constants(model: PreTrainedModel) -> None:
    """Biases of zero and norms of one would be the same wherever a wrong map found them."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
            tensor.add_(torch.randn_like(tensor), alpha=0.05)


# What the test suite proves in each run.
TESTED: dict[str, Family] = {
    "qwen3": Family("qwen3", SMALL | {"tie_word_embeddings": True}),
    "llama": Family("llama", SMALL | {"tie_word_embeddings": False}),
    "gpt2": Family("gpt2", SHARED | {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "qwen3_moe": Family("qwen3_moe", SMALL | EXPERTS | {"tie_word_embeddings": False}),
    "qwen2": Family("qwen2", WITHOUT_HEAD_DIM | {"tie_word_embeddings": True}),
    "mistral": Family("mistral", SMALL | {"sliding_window": None}),
    "gemma2": Family("gemma2", SMALL | {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gemma3": Family("gemma3_text", SMALL | {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "phi3": Family("phi3", WITHOUT_HEAD_DIM | {"pad_token_id": 0}),
    "opt": Family(
        "opt",
        SHARED
        | {
            "bos_token_id": 0,
            "pad_token_id": 1,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "init_std": 0.08,
        },
    ),
    "starcoder2": Family("starcoder2", WITHOUT_HEAD_DIM),
    "mixtral": Family("mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_next": Family(
        "qwen3_next",
        SMALL | EVERY_EXPERT | DELTA_NET | {"shared_expert_intermediate_size": 64},
        "bfloat16",
    ),
}

# What `make models` tries beside them: each works, or is refused with a reason.
FURTHER: dict[str, Family] = {
    "afmoe": Family(
        "afmoe",
        PLAIN
        | EXPERTS
        | {
            "num_shared_experts": 1,
            "sliding_window": 64,
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "apertus": Family("apertus", dtype="bfloat16"),
    "arcee": Family("arcee"),
    # vLLM computes gelu exactly where Bloom and transformers take tanh for it: 8e-4 nats apart.
    "bloom": Family(
        "bloom", SHARED | PADDED | {"hidden_size": 128, "n_layer": 2, "n_head": 4}, "bfloat16"
    ),
    "cohere": Family("cohere", PLAIN | {"use_qk_norm": True, "logit_scale": 1.0}),
    "cohere2": Family("cohere2", PLAIN | {"logit_scale": 1.0}),
    "cohere2_window": Family("cohere2", PLAIN | {"sliding_window": 64, "logit_scale": 1.0}),
    "cwm": Family("cwm", PLAIN | {"sliding_window": 64}),
    "dbrx": Family(
        "dbrx",
        SHARED
        | PADDED
        | {
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek_v2": Family("deepseek_v2", LATENT, arguments=ROTATED_BY_TORCH),
    "deepseek_v2_mla_off": Family(
        "deepseek_v2",
        LATENT,
        environment={"VLLM_MLA_DISABLE": "1"},
        arguments=ROTATED_BY_TORCH,
    ),
    "deepseek_v3": Family("deepseek_v3", LATENT | SIGMOID, arguments=ROTATED_BY_TORCH),
    "deepseek_v3_mla_off": Family(
        "deepseek_v3",
        LATENT | SIGMOID,
        environment={"VLLM_MLA_DISABLE": "1"},
        arguments=ROTATED_BY_TORCH,
    ),
    "ernie4_5": Family("ernie4_5"),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        PLAIN
        | {
            "moe_intermediate_size": 64,
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "exaone4": Family("exaone4", PLAIN | {"sliding_window": 64}),
    "exaone_moe": Family(
        "exaone_moe", PLAIN | EXPERTS | {"num_shared_experts": 1, "sliding_window": 64}
    ),
    "falcon": Family(
        "falcon",
        SHARED
        | PADDED
        | {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "falcon_h1": Family("falcon_h1", PLAIN | MAMBA_LAYERS, arguments=UNCACHED),
    "falcon_mamba": Family("falcon_mamba", MAMBA),
    "flex_olmo": Family("flex_olmo", PLAIN | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": Family("gemma"),
    "gemma4": Family(
        "gemma4_text",
        PLAIN
        | {
            "global_head_dim": 32,
            "sliding_window": 64,
            "vocab_size_per_layer_input": 259,
            "hidden_size_per_layer_input": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "glm": Family("glm"),
    "glm4": Family("glm4"),
    "glm4_moe": Family("glm4_moe", PLAIN | ROUTED | {"use_qk_norm": True}),
    "glm4_moe_lite": Family("glm4_moe_lite", LATENT, arguments=ROTATED_BY_TORCH),
    "gpt_bigcode": Family(
        "gpt_bigcode",
        SHARED | PADDED | {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "gpt_j": Family(
        "gptj",
        SHARED
        | PADDED
        | {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 16},
    ),
    "gpt_neox": Family("gpt_neox", ALL_HEADS),
    "gpt_oss": Family(
        "gpt_oss",
        PLAIN
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": Family("granite"),
    "granitemoe": Family("granitemoe", PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        PLAIN
        | MAMBA_LAYERS
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "position_embedding_type": None,
        },
        arguments=UNCACHED,
    ),
    "granitemoeshared": Family(
        "granitemoeshared",
        PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    ),
    "hunyuan_dense": Family("hunyuan_v1_dense"),
    "hunyuan_moe": Family("hunyuan_v1_moe", PLAIN | {"num_experts": 4, "moe_topk": 2}),
    "hyperclovax": Family("hyperclovax"),
    "jais2": Family("jais2", PLAIN | {"num_key_value_heads": 4}),
    "jamba": Family(
        "jamba",
        PLAIN_WITHOUT_HEAD_DIM
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 8,
            "mamba_d_state": 16,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": Family(
        "lfm2",
        PLAIN_WITHOUT_HEAD_DIM
        | {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "conv_dim": 128,
            "block_dim": 128,
            "block_ff_dim": 192,
        },
        arguments=ROTATED_BY_TORCH,
    ),
    "lfm2_moe": Family(
        "lfm2_moe",
        PLAIN_WITHOUT_HEAD_DIM
        | EXPERTS
        | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        arguments=ROTATED_BY_TORCH,
    ),
    "llama4": Family(
        "llama4_text",
        PLAIN
        | {
            "intermediate_size_mlp": 192,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
    ),
    "mamba": Family("mamba", MAMBA),
    "mamba2": Family(
        "mamba2",
        MAMBA | {"num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 64},
        arguments=UNCACHED,
    ),
    "minicpm3": Family("minicpm3", LATENT | {"scale_emb": 1, "dim_model_base": 128}),
    "minimax_m2": Family(
        "minimax_m2",
        PLAIN
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 16,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
    ),
    "ministral3": Family("ministral3"),
    "nemotron": Family("nemotron"),
    "nemotron_h": Family(
        "nemotron_h",
        PLAIN
        | {
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 64,
            "use_mamba_kernels": False,
            "time_step_min": SHORTEST_STEP,
        },
        arguments=UNCACHED,
    ),
    "olmo": Family("olmo", PLAIN_WITHOUT_HEAD_DIM),
    "olmo2": Family("olmo2", PLAIN_WITHOUT_HEAD_DIM),
    "olmo3": Family("olmo3", PLAIN_WITHOUT_HEAD_DIM | {"sliding_window": 64}),
    "olmo_hybrid": Family(
        "olmo_hybrid", ALL_HEADS | DELTA_NET | {"linear_num_key_heads": 2}, "bfloat16"
    ),
    "olmoe": Family("olmoe", PLAIN_WITHOUT_HEAD_DIM | {"num_experts": 4, "num_experts_per_tok": 2}),
    "phi": Family("phi", ALL_HEADS),
    "qwen2_moe": Family(
        "qwen2_moe",
        PLAIN_WITHOUT_HEAD_DIM | EXPERTS | {"shared_expert_intermediate_size": 64},
    ),
    "seed_oss": Family("seed_oss", PLAIN | {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "smollm3": Family("smollm3"),
    "stablelm": Family("stablelm", ALL_HEADS),
    "vaultgemma": Family("vaultgemma", PLAIN | {"query_pre_attn_scalar": 32}),
    "zamba2": Family(
        "zamba2",
        PLAIN_WITHOUT_HEAD_DIM
        | {
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "n_mamba_heads": 8,
            "mamba_d_state": 16,
            "mamba_headdim": 32,
            "chunk_size": 64,
            "adapter_rank": 8,
            "use_mamba_kernels": False,
            "time_step_min": SHORTEST_STEP,
        },
        arguments=UNCACHED,
    ),
}

FAMILIES = TESTED | FURTHER
