"""Micro-batches in buckets: what they say is what they say as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.bucketed import Bucket, Inputs, losses
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.samples import TokenizedSample

Make = Callable[[str], Any]
CASES = {
    "one": [TokenizedSample((3, 50, 7, 99), (140, 2, 77))],
    "without a context": [TokenizedSample((3,), (140, 2, 77)), TokenizedSample((4,), (9, 8))],
    "unlike": [
        TokenizedSample((3, 50, 7, 99), (140, 2, 77)),
        TokenizedSample((11, 12), (13, 14), 0.5, (1.0, 3.0)),
    ],
    "one context": [
        TokenizedSample((3, 50, 7), (60, 61), 2.0),
        TokenizedSample((3, 50, 8), (62, 63, 64)),
        TokenizedSample((5, 6, 9, 9), (65,)),
    ],
}


def gradients(model: Any, weighted: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.autograd.backward([weighted])
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "qwen3_moe"])
def test_losses_and_gradients_are_those_of_the_micro_batch(
    make_model: Make, family: str, case: str
) -> None:
    model = make_model(family)
    (batch,) = plan_batches(CASES[case], 1000, Mixing.PADDED)
    inputs = Inputs(Bucket.of(batch), model.device)
    for divisor in (3.0, 5.0):
        inputs.fill(batch, divisor)
        weighted, sums = losses(model, inputs)
        expected = batch_loss(model, batch, FrozenContexts(model), divisor)
        torch.testing.assert_close(sums, expected.sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weighted, expected.weighted, rtol=1e-5, atol=1e-6)
        got, wanted = gradients(model, weighted), gradients(model, expected.weighted)
        assert got.keys() == wanted.keys()
        for name in got:
            apart = torch.linalg.vector_norm(got[name] - wanted[name])
            assert apart <= 1e-4 * torch.linalg.vector_norm(wanted[name]) + 1e-6, name


def test_what_was_in_the_inputs_before_is_gone(make_model: Make) -> None:
    model = make_model("qwen3")
    batches = [plan_batches([each], 1000, Mixing.PADDED)[0] for each in CASES["unlike"]]
    assert Bucket.of(batches[0]) == Bucket.of(batches[1])
    inputs = Inputs(Bucket.of(batches[0]), model.device)
    for batch in (*batches, batches[0]):
        inputs.fill(batch, 1.0)
        expected = batch_loss(model, batch, FrozenContexts(model)).sums
        torch.testing.assert_close(losses(model, inputs)[1], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_bucket_is_little_wider_than_what_is_in_it(context: int, learned: int) -> None:
    sample = TokenizedSample((1,) * (context + 1), (2,) * learned)
    bucket = Bucket.of(plan_batches([sample], 10**6, Mixing.PADDED)[0])
    for width, true in ((bucket.context_width, context), (bucket.learned_width, learned)):
        assert true <= width <= max(true + 15, true * 9 / 8)
