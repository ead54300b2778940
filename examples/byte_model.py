"""Builds a small Qwen3 with a byte-level tokenizer, from nothing but code and a seed.

Run as `python examples/byte_model.py FOLDER`; the folder then holds what vLLM and transformers
load: config, tokenizer, chat template and random weights in fp32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and three special ones: 259 tokens, any text, nothing learned."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0]
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def small_qwen3() -> Qwen3Config:
    """2.9 million parameters, tied embeddings."""
    return Qwen3Config(
        vocab_size=259,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def write_model(
    folder: Path, config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a model of random weights and its tokenizer; the same seed gives the same bytes."""
    return save_model(folder, random_model(config, seed=seed, dtype=dtype))


def random_model(
    config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of random weights; the same seed gives the same ones."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype)
    model.config.dtype = dtype
    return model


def save_model(folder: Path, model: PreTrainedModel) -> Path:
    """Writes a model and the byte tokenizer as a model directory."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(write_model(Path(sys.argv[1]), small_qwen3()))
