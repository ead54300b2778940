"""Models whose parameters two ranks divide as vLLM divides them at tensor parallel size 2."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from apollo_grpc.region import Region
from apollo_trainer.parallel.parts import part_of
from apollo_trainer.parallel.ranks import Ranks
from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.divided_model import divide_model
from apollo_trainer.weights.live_model import fill_with_views

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": 0,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "Qwen3, tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    # Its rows are padded to 320, so that the ranks have 160 and 99.
    "Llama": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, pad_token_id=200),
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, **MOE, tie_word_embeddings=False),
    "one head of keys": Qwen3Config(**SIZES | {"num_key_value_heads": 1}, tie_word_embeddings=True),
}
_CUT = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "o_proj": 1,
    "down_proj": 1, "embed_tokens": 0, "lm_head": 0,
}  # fmt: skip


def whole_model(family: str) -> Any:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    for parameter in model.parameters():
        # Norms and biases that are not all ones and zeros.
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def region_of(name: str, root: tuple[int, ...], rank: int, heads: int) -> Region:
    """What vLLM's worker `rank` of two has of a parameter."""
    whole = Region.whole_of(root)
    layer = name.split(".")[-2]
    if len(root) == 3:
        if name.endswith("gate_up_proj"):
            half = root[1] // 4
            runs = ((rank * half, half), (root[1] // 2 + rank * half, half))
            return Region(root, (whole.runs[0], runs, whole.runs[2]))
        half = root[2] // 2
        return Region(root, (*whole.runs[:2], ((rank * half, half),)))
    cut = _CUT.get(layer)
    if cut is None or cut >= len(root) or (layer in ("k_proj", "v_proj") and heads == 1):
        return Region(root, whole.runs, replica=rank)
    half = 160 if root[cut] == 259 else root[cut] // 2
    run = (rank * half, min(half, root[cut] - rank * half))
    return Region(root, (*whole.runs[:cut], (run,), *whole.runs[cut + 1 :]))


def regions_of(model: Any, rank: int) -> dict[str, Region]:
    heads = model.config.num_key_value_heads
    return {n: region_of(n, tuple(p.shape), rank, heads) for n, p in model.named_parameters()}


def divided_model(family: str, ranks: Ranks, regions: dict[str, Region] | None = None) -> Any:
    """The model of one of two ranks, over copies of its parts."""
    whole = whole_model(family)
    regions = regions or regions_of(whole, ranks.rank)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family])
    parts = {n: part_of(p.detach(), regions[n]).clone() for n, p in whole.named_parameters()}
    fill_with_views(model, plan_checkpoint(model), parts)
    divide_model(model, regions, ranks)
    return model
