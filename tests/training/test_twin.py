"""A model without memory: the shapes of one with it, and what that computes with on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_trainer.training.attention import use_grouped_attention
from apollo_trainer.training.delta_rule import choose_delta_rule
from apollo_trainer.training.faster import speed_up
from apollo_trainer.training.memory import StepMemory
from apollo_trainer.training.needs import StepShape
from apollo_trainer.training.norms import fuse_norms
from apollo_trainer.training.options import StateShape
from apollo_trainer.training.twin import Kernels, twin_of, twin_of_directory

Make = Callable[[str], Any]


def test_a_twin_has_a_models_shapes_strides_and_ties_and_none_of_its_memory(
    make_model: Make,
) -> None:
    model = make_model("qwen3")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.mT.contiguous().mT
    twin = twin_of(model)
    for (name, ours), (same, theirs) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert (name, ours.shape, ours.stride()) == (same, theirs.shape, theirs.stride())
        assert theirs.is_meta and not ours.is_meta
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_has_the_twin_of_its_model_as_a_gpu_has_it(
    make_model: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model("qwen3").to(dtype)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    twin = twin_of_directory(tmp_path)
    shapes = [(name, p.shape, torch.bfloat16) for name, p in model.named_parameters()]
    assert [(name, p.shape, p.dtype) for name, p in twin.named_parameters()] == shapes
    assert all(tensor.is_meta for tensor in twin.parameters())


def test_kernels_of_a_twin_are_over_its_own_weights(make_model: Make) -> None:
    model = make_model("qwen3").bfloat16()
    assert fuse_norms(model) and use_grouped_attention(model)
    twin = twin_of(model)
    assert twin.model.norm.forward.args[0] is twin.model.norm
    with Kernels():
        assert twin(torch.zeros(1, 3, dtype=torch.int64, device="meta")).logits.is_meta
    assert not model(torch.zeros(1, 3, dtype=torch.int64)).logits.is_meta


def test_inside_only_tensors_without_memory_are_on_a_gpu() -> None:
    nothing, here = torch.empty(2, device="meta"), torch.zeros(2)
    with Kernels():
        assert nothing.is_cuda and not here.is_cuda
        assert not (nothing > 0).all() and (here == 0).all()
    assert not nothing.is_cuda


def test_attention_and_norms_keep_what_their_kernels_keep() -> None:
    """No scores [T, S], and no float32 copy of what is normed."""
    kept: list[torch.Size] = []
    size = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    query, weight = torch.empty(1, 2, 300, 64, **size), torch.empty(64, **size)
    saved = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((t.shape[-2:], t.dtype)) or t, lambda t: t
    )
    with Kernels(), saved:
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        torch.nn.functional.rms_norm(attended, (64,), weight, 1e-6)
    assert (torch.Size((300, 300)), torch.bfloat16) not in kept
    assert (torch.Size((300, 64)), torch.float32) not in kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_a_directory_is_told_of_as_the_model_that_is_served_from_it(
    make_model: Make, tmp_path: Path, family: str
) -> None:
    make_model(family).bfloat16().save_pretrained(tmp_path)
    capped = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **capped)
    model = model.cuda().eval()
    choose_delta_rule(model)
    speed_up(model)
    allocated = torch.cuda.memory_allocated()
    samples = StepShape(30, 12, samples=2).of_samples()
    needs = [
        StepMemory(twin, StateShape(8), 1024).step_bytes(samples)
        for twin in (twin_of(model), twin_of_directory(tmp_path))
    ]
    assert needs[0] == needs[1]
    assert torch.cuda.memory_allocated() == allocated
