"""Anchors beside what is learned: how they are weighed, and what a step tells of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_trainer.optim import Apollo
from apollo_trainer.training.evaluate import evaluate
from apollo_trainer.training.guard import Guard
from apollo_trainer.training.loss import continuation_loss, total_weight
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step
from apollo_trainer.training.teacher import top_tokens

Make = Callable[[str], Any]
LEARNED = [
    TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30), 2.0),
    TokenizedSample((11, 12), (13, 14), 0.5, (1.0, 3.0)),
]
ANCHORS = [
    TokenizedSample((3, 50, 7, 98), (20, 21, 22), 7.0, (1.0, 0.0, 2.0)),
    TokenizedSample((60, 62), (61,), 0.25),
]


def mean(model: Any, samples: list[TokenizedSample]) -> Tensor:
    """Of the losses of all their tokens, by their weights."""
    total = torch.stack([continuation_loss(model, s).weighted for s in samples]).sum()
    return total / sum(map(total_weight, samples))


def norm_of_gradient(model: Any, loss: Tensor) -> float:
    torch.autograd.backward([loss])
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return math.sqrt(sum(float(grad.square().sum()) for grad in grads))


@pytest.mark.parametrize("budget", [1000, 1], ids=["one forward", "one by one"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 4.0])
def test_they_count_as_one_mean_beside_another(
    make_model: Make, weight: float, budget: int
) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    loss = mean(model, LEARNED) + weight * mean(model, ANCHORS)
    expected = norm_of_gradient(model, loss)
    policy = StepPolicy(budget, dry_run=True)
    result = take_step(model, optimizer, LEARNED, policy, anchors=ANCHORS, anchor_weight=weight)
    assert result.grad_norm == pytest.approx(expected, rel=1e-4)
    assert result.micro_batches == (1 if budget > 1 else 4)


@pytest.mark.parametrize("budget", [1000, 1], ids=["one forward", "one by one"])
def test_the_other_figures_are_of_what_is_learned(make_model: Make, budget: int) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    policy = StepPolicy(budget, dry_run=True)
    alone = take_step(model, optimizer, LEARNED, policy)
    beside = take_step(model, optimizer, LEARNED, policy, anchors=ANCHORS)
    assert (beside.tokens, alone.anchor_loss) == (alone.tokens, None)
    assert (beside.loss, beside.loss_sum) == pytest.approx((alone.loss, alone.loss_sum), rel=1e-6)
    assert beside.sample_losses == pytest.approx(evaluate(model, LEARNED), rel=1e-5)
    of_anchors = [continuation_loss(model, anchor).loss_sum for anchor in ANCHORS]
    assert beside.anchor_loss == pytest.approx(sum(of_anchors) / 4, rel=1e-5)


def test_without_weight_they_are_read_and_change_nothing(make_model: Make) -> None:
    models = [make_model("qwen3") for _ in range(2)]
    weightless = [replace(anchor, weight=0.0) for anchor in ANCHORS]
    for model, anchors in zip(models, ([], weightless), strict=True):
        optimizer = Apollo(model.named_parameters(), rank=8, lr=1e-3)
        result = take_step(model, optimizer, LEARNED, StepPolicy(1), anchors=anchors)
        assert (result.anchor_loss is None) is not anchors
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_guard_goes_by_what_is_learned(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    dry = take_step(model, optimizer, LEARNED, StepPolicy(dry_run=True), anchors=ANCHORS)
    guard = Guard(max_loss=dry.loss * 1.01, min_loss=dry.loss * 0.99)
    taken = take_step(model, optimizer, LEARNED, StepPolicy(guard=guard), anchors=ANCHORS)
    assert taken.optimizer_step == 1


def test_what_is_anchored_stays_nearer_to_what_it_was(make_model: Make) -> None:
    far = []
    for weight in (0.0, 10.0):
        model = make_model("qwen3")
        kept = [
            replace(anchor, targets=top)
            for anchor, top in zip(ANCHORS, top_tokens(model, ANCHORS, 20), strict=True)
        ]
        optimizer = Apollo(model.named_parameters(), rank=8, lr=3e-3)
        first = take_step(model, optimizer, LEARNED, anchors=kept, anchor_weight=weight)
        assert first.anchor_loss == pytest.approx(0.0, abs=1e-5)
        for _ in range(15):
            last = take_step(model, optimizer, LEARNED, anchors=kept, anchor_weight=weight)
        assert last.loss < 0.8 * first.loss and last.anchor_loss is not None
        far.append(last.anchor_loss)
    assert far[1] < 0.3 * far[0]
