"""Attention by groups says what transformers' own says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_trainer.training.attention import (
    NAME,
    grouped_attention,
    mark_span,
    use_grouped_attention,
)
from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.samples import TokenizedSample

Make = Callable[[str], Any]
SAMPLES = [
    TokenizedSample((3, 50, 7, 99, 4, 5, 6, 8), (140, 2, 77)),
    TokenizedSample((11, 12), (13, 14), 0.5, (1.0, 3.0)),
]


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gemma3", "qwen3_moe", "gpt2"])
def test_losses_and_gradients_are_the_same(make_model: Make, family: str) -> None:
    plain = make_model(family)
    grouped = copy.deepcopy(plain)
    assert use_grouped_attention(grouped)
    assert grouped.config._attn_implementation == NAME
    for samples in (SAMPLES, SAMPLES[:1]):
        (batch,) = plan_batches(samples, 1000, Mixing.PADDED)
        losses = [batch_loss(m, batch, FrozenContexts(m)) for m in (plain, grouped)]
        torch.testing.assert_close(losses[1].sums, losses[0].sums, rtol=1e-5, atol=1e-5)
        torch.autograd.backward([loss.weighted for loss in losses])
    for one, other in zip(plain.parameters(), grouped.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)


def test_a_model_that_attends_otherwise_is_left_alone(make_model: Make) -> None:
    model = make_model("qwen3")
    model.set_attn_implementation("eager")
    assert not use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("first", [0, 1, 37])
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (4, 4)])
def test_a_span_says_what_its_mask_says(first: int, heads: int, key_heads: int) -> None:
    torch.manual_seed(0)
    mask = torch.ones(1, 1, 20, 60, dtype=torch.bool, device="cuda").tril(40)
    mask[..., :first] = False

    def drawn(count: int, width: int) -> torch.Tensor:
        drawn = torch.randn(1, width, count, 64, device="cuda", dtype=torch.bfloat16)
        return drawn.transpose(1, 2).requires_grad_()

    inputs = [drawn(heads, 20), drawn(key_heads, 60), drawn(key_heads, 60)]
    found = []
    for marked in (False, True):
        if marked:
            mark_span(mask, torch.tensor(first, device="cuda"))
        answer, _ = grouped_attention(torch.nn.Identity(), *inputs, mask, scaling=0.1)
        assert answer.shape == (1, 20, heads, 64)
        found.append([answer, *torch.autograd.grad(answer.float().cos().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        seen = slice(first, None) if one.shape[2] == 60 else slice(None)
        apart = (one[:, :, seen].float() - other[:, :, seen].float()).abs().max()
        assert apart < 0.02 * one.float().abs().max()
