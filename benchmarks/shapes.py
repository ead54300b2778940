"""Shapes of the parameters of Qwen3 models, by their names in transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Qwen3:
    """The sizes that decide the shapes; the embedding is tied to the output."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def shapes(self) -> Shapes:
        """Returns every parameter's shape, in the model's order."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for n in range(self.layers):
            for name, shape in self._layer().items():
                found[f"model.layers.{n}.{name}.weight"] = shape
        found["model.norm.weight"] = (self.hidden,)
        return found

    def _layer(self) -> Shapes:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }


def qwen3_4b() -> Shapes:
    """Qwen3-4B, 4.02e9 parameters: what is measured on a GPU."""
    return Qwen3(2560, 36, 9728, 32, 8, 128, 151936).shapes()


def qwen3_0_6b() -> Shapes:
    """Qwen3-0.6B, 5.96e8 parameters, 1.1 GiB in bfloat16."""
    return Qwen3(1024, 28, 3072, 16, 8, 128, 151936).shapes()


def qwen3_100m() -> Shapes:
    """The same architecture with about 1e8 parameters: what is measured on a CPU."""
    return Qwen3(1024, 6, 2816, 16, 8, 64, 32000).shapes()


def qwen3_tiny() -> Shapes:
    """The same architecture with about 2e6 parameters: to see that everything runs."""
    return Qwen3(256, 2, 704, 4, 2, 64, 1000).shapes()


TABLES = {
    "qwen3-4b": qwen3_4b,
    "qwen3-0.6b": qwen3_0_6b,
    "qwen3-100m": qwen3_100m,
    "qwen3-tiny": qwen3_tiny,
}


def count(shapes: Shapes) -> int:
    """The number of elements in all the shapes together."""
    return sum(math.prod(shape) for shape in shapes.values())
