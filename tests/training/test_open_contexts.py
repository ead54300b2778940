"""Gradients through contexts: those of the whole sequence, with a loss on continuations alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from apollo_trainer.optim import Apollo
from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.bucketed import Bucket, Inputs, losses
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step
from tests.training.test_anchors import ANCHORS, LEARNED, norm_of_gradient
from tests.training.test_mixed_losses import ALL

Make = Callable[[str], Any]
OPEN = StepPolicy(dry_run=True, open_tokens=100)


def whole(model: Any, sample: TokenizedSample) -> torch.Tensor:
    """The weighed cross-entropy of a continuation, by one forward over all of the sample."""
    ids = torch.tensor([[*sample.context_ids, *sample.continuation_ids]])
    begin = len(sample.context_ids) - 1
    logits = model(ids).logits[0, begin:-1]
    each = F.cross_entropy(logits, torch.tensor(sample.continuation_ids), reduction="none")
    factors = torch.tensor(sample.token_weights or (1.0,) * len(each))
    return (each * factors * sample.weight).sum()


def total(sample: TokenizedSample) -> float:
    return sample.weight * sum(sample.token_weights or (1.0,) * len(sample.continuation_ids))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_the_gradient_is_that_of_the_whole_sequence(make_model: Make, family: str) -> None:
    model = make_model(family)
    loss = torch.stack([whole(model, s) for s in LEARNED]).sum() / sum(map(total, LEARNED))
    loss = loss + 0.3 * (
        torch.stack([whole(model, s) for s in ANCHORS]).sum() / sum(map(total, ANCHORS))
    )
    expected = norm_of_gradient(model, loss)
    optimizer = Apollo(model.named_parameters(), rank=8)
    found = take_step(model, optimizer, LEARNED, OPEN, anchors=ANCHORS, anchor_weight=0.3)
    frozen = take_step(
        model, optimizer, LEARNED, replace(OPEN, open_tokens=0), anchors=ANCHORS,
        anchor_weight=0.3,
    )  # fmt: skip
    assert found.grad_norm == pytest.approx(expected, rel=1e-4)
    assert frozen.grad_norm != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("samples", [LEARNED, ALL], ids=["plain", "every loss"])
def test_figures_are_those_of_frozen_contexts(
    make_model: Make, samples: list[TokenizedSample]
) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    found = take_step(model, optimizer, samples, OPEN)
    frozen = take_step(model, optimizer, samples, replace(OPEN, open_tokens=0))
    assert found.tokens == frozen.tokens
    assert found.loss == pytest.approx(frozen.loss, rel=1e-4, abs=1e-5)
    assert found.sample_losses == pytest.approx(frozen.sample_losses, rel=1e-4, abs=1e-5)
    if found.policy is not None and frozen.policy is not None:
        assert vars(found.policy) == pytest.approx(vars(frozen.policy), rel=1e-4)


def test_in_buckets_they_are_the_same(make_model: Make) -> None:
    model = make_model("qwen3")
    (batch,) = plan_batches([sample.opened(100) for sample in ALL], 1000, Mixing.PADDED)
    inputs = Inputs(Bucket.of(batch), model.device)
    inputs.fill(batch, 3.0)
    weighted, sums = losses(model, inputs)
    expected, expected_sums = batch_loss(model, batch, FrozenContexts(model), 3.0)
    torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=1e-4)


def test_a_sample_is_opened_from_its_end_and_its_first_token_never_is() -> None:
    sample = TokenizedSample((1, 2, 3), (4, 5))
    assert sample.opened(1) == TokenizedSample((1, 2), (3, 4, 5), open_tokens=1)
    opened = TokenizedSample((1,), (2, 3, 4, 5), open_tokens=2)
    assert sample.opened(2) == sample.opened(9) == sample.opened(1).opened(1) == opened
    assert opened.learned_tokens == sample.learned_tokens == 2
    single = TokenizedSample((1,), (4, 5))
    assert single.opened(5) == single
