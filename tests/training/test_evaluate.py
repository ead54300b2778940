"""Losses of samples under the weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apollo_trainer.optim import Apollo
from apollo_trainer.training.evaluate import evaluate
from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import take_step

Make = Callable[[str], Any]
SAMPLES = [
    TokenizedSample(tuple(range(30)), (140, 2, 77, 30), 3.0, (0.0, 1.0, 0.0, 5.0)),
    TokenizedSample((11,), (13, 14)),
    TokenizedSample(tuple(range(30)), (9,)),
    TokenizedSample((11, 12), (13, 14)),
]


@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe", "qwen3_next"])
def test_each_sample_has_its_own_mean_loss_in_order_and_without_weights(
    make_model: Make, family: str, budget: int
) -> None:
    model = make_model(family)
    expected = [continuation_loss(model, s).loss_sum / len(s.continuation_ids) for s in SAMPLES]
    assert evaluate(model, SAMPLES, budget) == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_learned_sample_has_a_lower_loss_after_than_before(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8, lr=1e-2)
    before = evaluate(model, SAMPLES)
    for _ in range(10):
        take_step(model, optimizer, SAMPLES[3:])
    assert evaluate(model, SAMPLES)[3] < 0.5 * before[3]


def test_it_can_be_stopped_between_micro_batches(make_model: Make) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(make_model("qwen3"), SAMPLES, before_batch=stop)
