"""Gradients of many micro-batches are summed without loss, whatever the weights' dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.accumulation import summed_gradients
from apollo_trainer.training.guard import Guard
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step

Make = Callable[[str], Any]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
# Of one rounding: a part, and the sum.
NOISE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}


@DTYPES
@pytest.mark.parametrize("parts", [1, 256, 1024])
def test_a_gradient_in_many_equal_parts_is_the_gradient(dtype: torch.dtype, parts: int) -> None:
    torch.manual_seed(1)
    gradient, weight = torch.randn(64, 24), torch.nn.Parameter(torch.zeros(64, 24, dtype=dtype))
    with summed_gradients([weight]):
        for _ in range(parts):
            torch.autograd.backward([(weight * gradient.to(dtype)).sum() / parts])
            assert weight.grad is None, "one part lives at a time"
    assert weight.grad is not None and weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad.float(), gradient, rtol=2 * NOISE[dtype], atol=1e-4)
    norm = pytest.approx(float(gradient.norm()), rel=NOISE[dtype])
    assert float(weight.grad.float().norm()) == norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_micro_batches_after_a_large_one_count(make_model: Make, dtype: torch.dtype) -> None:
    """Each adds less than half of what 16 bits can tell apart: in them, a ninth would be lost."""
    model = make_model("qwen3").to(dtype)
    optimizer = Apollo(model.named_parameters(), rank=8)
    one = TokenizedSample((3, 50), (140, 2))
    samples = [TokenizedSample((3, 50), (140, 2), weight) for weight in (520.0, *(1.0,) * 65)]
    policy = StepPolicy(token_budget=2, dry_run=True)
    alone, many = (take_step(model, optimizer, each, policy) for each in ([one], samples))
    assert many.micro_batches == 66
    assert many.grad_norm == pytest.approx(alone.grad_norm, rel=5e-3)


def test_what_the_optimizer_is_given_is_of_the_weights_dtype(make_model: Make) -> None:
    """Its loops and kernels are compiled for that at the attachment, and for no other."""
    model, seen = make_model("qwen3").bfloat16(), set()
    optimizer = Apollo(model.named_parameters(), rank=8)
    optimizer.before_param_write = lambda param: seen.add(param.grad.dtype)
    samples = [TokenizedSample((3, 50), (140, 2)), TokenizedSample((4, 5), (6, 7))]
    assert take_step(model, optimizer, samples, StepPolicy(token_budget=2)).micro_batches == 2
    assert seen == {torch.bfloat16}


def test_a_pass_that_fails_leaves_no_gradient_and_the_next_sum_is_right() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="enough"), summed_gradients([weight]):
        torch.autograd.backward([weight.sum()])
        raise RuntimeError("enough")
    assert weight.grad is None
    with summed_gradients([weight]):
        torch.autograd.backward([weight.sum()])
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones(4))


@pytest.mark.parametrize("budget", [2, 100], ids=["accumulated", "tied"])
def test_a_tied_pair_in_16_bits_is_stepped_and_previewed(make_model: Make, budget: int) -> None:
    model = make_model("qwen3").bfloat16()
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach())
    optimizer = Apollo(model.named_parameters(), rank=8, lr=1e-3)
    optimizer.measure = True
    samples = [TokenizedSample((3, 50), (140, 2)), TokenizedSample((4, 5), (6, 7))]
    guard = Guard(max_update_ratio=1.0)
    tried, done = (
        take_step(model, optimizer, samples, StepPolicy(budget, guard, dry_run=dry))
        for dry in (True, False)
    )
    assert tried.update_norm == pytest.approx(done.update_norm, rel=1e-9)
    assert tried.grad_norm == pytest.approx(done.grad_norm, rel=1e-9)
