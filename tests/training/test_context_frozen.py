"""docs/context-frozen.md, checked: what the frozen context takes out of the gradient, term by term.

The gradient of prompt-masked fine-tuning is that of the frozen context, plus what flows into the
context's keys and values and on from there through the context's own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.samples import TokenizedSample

Make = Callable[[str], Any]
Gradients = dict[str, torch.Tensor]
SAMPLE = TokenizedSample((3, 50, 7, 99, 12), (140, 2, 77, 30))
ONE_CONTEXT_TOKEN = TokenizedSample((12,), (140, 2, 77, 30))
# Of the last layer, what no key or value of the context depends on.
AFTER_THE_LAST_KEYS = (
    "lm_head",
    "model.norm",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.q_norm",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.post_attention_layernorm",
    "model.layers.1.mlp",
)


def untied(make_model: Make) -> Any:
    """Tied, the embedding's gradient would hold that of the head."""
    model = make_model("qwen3")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def gradients(model: Any) -> Gradients:
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def frozen(model: Any, sample: TokenizedSample) -> Gradients:
    torch.autograd.backward([continuation_loss(model, sample).weighted])
    return gradients(model)


def prompt_masked(model: Any, sample: TokenizedSample) -> Gradients:
    """One forward over everything; the loss leaves the context out."""
    ids = torch.tensor([[*sample.context_ids, *sample.continuation_ids]])
    logits = model(ids, use_cache=False).logits[0, len(sample.context_ids) - 1 : -1]
    loss = F.cross_entropy(logits, torch.tensor(sample.continuation_ids), reduction="sum")
    torch.autograd.backward([loss])
    return gradients(model)


def through_keys_and_values(model: Any, sample: TokenizedSample) -> Gradients:
    """What the loss asks of the context's keys and values, sent back through the context."""
    ids = torch.tensor([sample.context_ids[:-1]])
    context = model(ids, use_cache=True).past_key_values
    made = [t for layer in context.layers for t in (layer.keys, layer.values)]
    leaves = [t.detach().requires_grad_() for t in made]
    cache = DynamicCache(zip(leaves[::2], leaves[1::2], strict=True))
    inputs = torch.tensor([[sample.context_ids[-1], *sample.continuation_ids[:-1]]])
    logits = model(inputs, past_key_values=cache, use_cache=True).logits[0]
    loss = F.cross_entropy(logits, torch.tensor(sample.continuation_ids), reduction="sum")
    asked = torch.autograd.grad(loss, leaves)
    torch.autograd.backward(made, asked)
    return gradients(model)


def test_prompt_masking_adds_what_flows_through_the_contexts_keys_and_values(
    make_model: Make,
) -> None:
    model = untied(make_model)
    masked, kept, missing = (
        gradient(model, SAMPLE) for gradient in (prompt_masked, frozen, through_keys_and_values)
    )
    for name, whole in masked.items():
        torch.testing.assert_close(kept[name] + missing[name], whole, rtol=1e-4, atol=1e-5)


def test_only_what_makes_keys_and_values_of_the_context_has_another_gradient(
    make_model: Make,
) -> None:
    model = untied(make_model)
    masked, kept = prompt_masked(model, SAMPLE), frozen(model, SAMPLE)
    for name, whole in masked.items():
        if name.startswith(AFTER_THE_LAST_KEYS):
            torch.testing.assert_close(kept[name], whole, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert (kept[name] - whole).norm() > 0.05 * whole.norm(), name


def test_tokens_of_the_frozen_context_have_no_gradient_in_the_embedding(make_model: Make) -> None:
    model = untied(make_model)
    frozen_ids = list(SAMPLE.context_ids[:-1])
    rows = {
        way.__name__: way(model, SAMPLE)["model.embed_tokens.weight"][frozen_ids].abs().sum(-1)
        for way in (frozen, prompt_masked)
    }
    assert (rows["frozen"] == 0).all()
    assert (rows["prompt_masked"] > 0).all()


def test_the_last_context_token_learns_and_its_keys_and_values_carry_gradient(
    make_model: Make,
) -> None:
    model = untied(make_model)
    embedding = frozen(model, SAMPLE)["model.embed_tokens.weight"]
    assert embedding[SAMPLE.context_ids[-1]].abs().sum() > 0


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "qwen3_moe"])
def test_with_a_context_of_one_token_nothing_is_frozen(make_model: Make, family: str) -> None:
    model = make_model(family)
    masked, kept = (way(model, ONE_CONTEXT_TOKEN) for way in (prompt_masked, frozen))
    for name, whole in masked.items():
        torch.testing.assert_close(kept[name], whole, rtol=1e-4, atol=1e-5, msg=name)
