"""Tiny multimodal models, laid out as their families are published."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from examples.byte_model import SPECIAL, byte_tokenizer, save_model
from tests.vllm.families import DELTA_NET, EVERY_EXPERT, PLAIN, SEED, SMALL, Family, vary_constants

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
PARTIAL_ROPE = ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
DELTA_NET_TEXT = PLAIN | DELTA_NET | {"rope_parameters": PARTIAL_ROPE}


@dataclass(frozen=True)
class Wrapper(Family):
    """A tiny multimodal model.

    Attributes:
        text: the parts of the directory that are trained.
        rest: all others.
        fixed: what the names of tensors of the text end with that transformers does not train.
        heads: shapes of the tensors of multi-token heads, which transformers has no class for.
        stacked: whether experts lie stacked in the directory, as published, and not apart.
        published: what a name holds as transformers saves it, and as it was published.
    """

    text: tuple[str, ...] = ("model.language_model", "lm_head")
    rest: tuple[str, ...] = ("model.visual",)
    fixed: tuple[str, ...] = ()
    heads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stacked: bool = False
    published: tuple[str, str] = ("", "")

    def write(self, folder: Path) -> Path:
        """Writes the model directory; the same bytes each time."""
        torch.manual_seed(SEED)
        config = AutoConfig.for_model(self.model_type, **self.fields)
        model = AutoModelForImageTextToText.from_config(config)
        model = model.to(getattr(torch, self.dtype))
        vary_constants(model)
        save_model(folder, model)
        (shard,) = folder.glob("*.safetensors")
        heads = {n: torch.randn(s).to(getattr(torch, self.dtype)) for n, s in self.heads.items()}
        saved = model.state_dict() if self.stacked else load_file(shard)
        saved = {n.replace(*self.published): tensor for n, tensor in saved.items()}
        save_file(saved | heads, shard, {"format": "pt"})
        return folder


WRAPPERS = {
    "qwen3_5": Wrapper(
        "qwen3_5",
        {"text_config": DELTA_NET_TEXT, "vision_config": QWEN_TOWER},
        "bfloat16",
        rest=("model.visual", "mtp"),
        heads={"mtp.fc.weight": (128, 256), "mtp.norm.weight": (128,)},
    ),
    "qwen3_5_moe": Wrapper(
        "qwen3_5_moe",
        {
            "text_config": DELTA_NET_TEXT | EVERY_EXPERT | {"shared_expert_intermediate_size": 64},
            "vision_config": QWEN_TOWER,
        },
        "bfloat16",
        stacked=True,
    ),
    "qwen3_vl": Wrapper(
        "qwen3_vl",
        {
            "text_config": PLAIN | {"rope_parameters": ROPE | {"mrope_section": [8, 4, 4]}},
            "vision_config": QWEN_TOWER,
        },
    ),
    "gemma3": Wrapper(
        "gemma3",
        {
            "text_config": SMALL
            | {"vocab_size": 263, "query_pre_attn_scalar": 32, "sliding_window": 64},
            "vision_config": TOWER,
            "mm_tokens_per_image": 4,
        },
        text=("language_model",),
        rest=("vision_tower", "multi_modal_projector"),
        published=("vision_tower.", "vision_tower.vision_model."),
    ),
    "gemma4": Wrapper(
        "gemma4",
        {
            "text_config": PLAIN
            | {
                "global_head_dim": 32,
                "sliding_window": 64,
                "vocab_size_per_layer_input": 259,
                "hidden_size_per_layer_input": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": TOWER | {"num_key_value_heads": 2, "head_dim": 16},
            "audio_config": None,
        },
        text=("model.language_model",),
        rest=("model.vision_tower", "model.embed_vision"),
        fixed=("layer_scalar",),
    ),
    "mistral3": Wrapper(
        "mistral3",
        {
            "text_config": PLAIN | {"model_type": "mistral", "tie_word_embeddings": False},
            "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 16},
            "tie_word_embeddings": False,
        },
        text=("language_model",),
        rest=("vision_tower", "multi_modal_projector"),
    ),
}


WITHOUT_TOWER = "--language-model-only"
STAND_IN = str(Path(__file__).parent / "stand_in")
# As the sweep calls them, beside the families of text alone.
SWEPT = {f"{name}_wrapper": wrapper for name, wrapper in WRAPPERS.items()}


def stand_in_for_torchvision() -> None:
    """In vLLM's process, before it begins, and in the one in which it looks at a model's class."""
    sys.path.insert(0, STAND_IN)
    os.environ["PYTHONPATH"] = STAND_IN


def add_processor(folder: Path) -> None:
    """What vLLM has to know of images, before it serves Gemma 3 with its tower."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        extra_special_tokens={"boi_token": "A", "eoi_token": "B", "image_token": "C"},
    )
    tokenizer.add_tokens(["\n" * count for count in (1, 2, 3, 4)])
    tokenizer.save_pretrained(folder)
    size = {"height": TOWER["image_size"], "width": TOWER["image_size"]}
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": size}
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    processor["image_processor"] = images
    (folder / "processor_config.json").write_text(json.dumps(processor))
