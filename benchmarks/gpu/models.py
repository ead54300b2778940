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
    DeepseekV2Config,
    GraniteMoeHybridConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
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
    # Of Granite 4 H's kind without experts: Mamba 2, and a layer of attention in six.
    "granite-h-0.3b": lambda: GraniteMoeHybridConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=3072,
        shared_intermediate_size=3072,
        num_local_experts=0,
        num_experts_per_tok=0,
        num_hidden_layers=12,
        layer_types=[*["mamba"] * 5, "attention"] * 2,
        num_attention_heads=16,
        num_key_value_heads=4,
        mamba_n_heads=32,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_expand=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    ),
    # Latent attention at DeepSeek V2's ranks and head sizes, its layers without experts.
    "mla-1b": lambda: DeepseekV2Config(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        first_k_dense_replace=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    ),
}


# --gdn-prefill-backend is vLLM 0.26's, whose default wants FlashInfer.
DELTA_NET = ("--gdn-prefill-backend", "triton")
# What vLLM is told of a shape beside its defaults. 27 billion take 54 GB, and minutes to compile.
OPTIONS = {
    "qwen3.5-1b": ("--language-model-only", *DELTA_NET),
    "qwen3.5-1b-tower": ("--skip-mm-profiling", *DELTA_NET),
    "qwen3.5-27b": (
        *("--language-model-only", *DELTA_NET),
        *("--gpu-memory-utilization", "0.6", "--enforce-eager"),
    ),
}
# What stands for an image or a video in a text, and where its id stands in the config.
_SEEN = {
    "image_pad": "image_token_id",
    "video_pad": "video_token_id",
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
}


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


def _small_qwen3_5() -> Any:
    return _qwen3_5(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=8,
        linear_num_value_heads=16,
        linear_num_key_heads=8,
    )


SHAPES |= {
    "qwen3.5-1b": _small_qwen3_5,
    "qwen3.5-1b-tower": _small_qwen3_5,
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


def write_shape(name: str, folder: Path, seed: int) -> Path:
    """A model directory in bf16, with a tokenizer that has a word for each token id."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        config = SHAPES[name]()
        wraps = hasattr(config, "text_config")
        kind = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    _write_tokenizer(folder, config)
    del model
    torch.cuda.empty_cache()
    return folder


def _write_tokenizer(folder: Path, config: Any) -> None:
    """A word for each id; for a wrapper also the words and the processor that its tower needs."""
    words = {f"t{token}": token for token in range(VOCABULARY)}
    seen = {f"<|{name}|>": getattr(config, at) for name, at in _SEEN.items() if hasattr(config, at)}
    tokenizer = Tokenizer(WordLevel(words | seen, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    written = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0")
    written.add_special_tokens({"additional_special_tokens": list(seen)})
    written.save_pretrained(folder)
    if seen:
        images, videos = Qwen2VLImageProcessor(), Qwen3VLVideoProcessor()
        Qwen3VLProcessor(images, written, videos).save_pretrained(folder)
