"""Model directories of real shapes with random weights, made on the GPU, seeded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 151_936
_QWEN3 = {
    "vocab_size": VOCABULARY,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "bos_token_id": None,
    "eos_token_id": 0,
}
# Sizes as published in the models' config.json; the mixture is a small one of the same kind.
SHAPES: dict[str, Callable[[], Any]] = {
    "qwen3-0.6b": lambda: Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": lambda: Qwen3Config(
        **_QWEN3,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        **_QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "qwen3-moe-1b": lambda: Qwen3MoeConfig(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
        tie_word_embeddings=False,
    ),
}


# Of text alone; --gdn-prefill-backend is vLLM 0.26's, whose default wants FlashInfer.
WRAPPED = ("--language-model-only", "--gdn-prefill-backend", "triton")


def _qwen3_5(**text: int) -> Any:
    """A wrapper as published, with a tower of one small layer, which nothing here asks for."""
    tower = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
    return Qwen3_5Config(
        text_config={
            "vocab_size": 248_320,
            "head_dim": 256,
            "num_key_value_heads": 4,
            "eos_token_id": 0,
            **text,
        },
        vision_config=tower | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=False,
    )


SHAPES |= {
    "qwen3.5-1b": lambda: _qwen3_5(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=8,
        linear_num_value_heads=16,
        linear_num_key_heads=8,
    ),
    # 26.9e9 parameters in its text part, which is what is published of Qwen3.5-27B's.
    "qwen3.5-27b": lambda: _qwen3_5(
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=64,
        num_attention_heads=24,
        linear_num_value_heads=48,
        linear_num_key_heads=16,
    ),
}


def served_with(shape: str) -> tuple[str, ...]:
    """What vLLM is told beside its defaults."""
    return WRAPPED if hasattr(SHAPES[shape](), "text_config") else ()


def write_shape(name: str, folder: Path, seed: int) -> Path:
    """A model directory in bf16, with a tokenizer that has a word for each token id."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        config = SHAPES[name]()
        wraps = hasattr(config, "text_config")
        kind = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {f"t{token}": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder
