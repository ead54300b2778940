"""Gradients as factors: equal to autograd's, summed without loss, and of any family of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.factored import Factored, Gradient
from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.gradients import StepGradients
from apollo_trainer.training.guard import Guard
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step

Make = Callable[[str], Any]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
# Of one rounding: a part, and the sum.
NOISE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}
FAMILIES = ["qwen3", "gpt2", "opt", "gemma2", "gemma3", "qwen3_moe", "mixtral", "qwen3_next"]
FAMILIES += ["mistral", "bloom", "mamba2", "jamba"]
# Of unlike lengths, one context twice, with weights: padded where the model can.
SAMPLES = [
    TokenizedSample((3, 50, 7, 99), (140, 2, 77)),
    TokenizedSample((3, 50, 7, 99), (60, 61), 2.0),
    TokenizedSample((11, 12), (13, 14), 0.5, (1.0, 3.0)),
]


def whole(gradient: Gradient) -> Tensor:
    return gradient.dense() if isinstance(gradient, Factored) else gradient


def run_passes(model: Any, mixing: Mixing, budget: int) -> None:
    """Backward passes over SAMPLES."""
    contexts = FrozenContexts(model)
    for batch in plan_batches(SAMPLES, budget, mixing):
        weighted, _ = batch_loss(model, batch, contexts, 5.0)
        torch.autograd.backward([weighted])


def expect_autograds(model: Any, mixing: Mixing, budget: int) -> dict[str, Gradient]:
    """Compares; returns the collected gradients by name."""
    run_passes(model, mixing, budget)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    collected = StepGradients(model.parameters())
    with collected.collecting():
        run_passes(model, mixing, budget)
    assert all(parameter.grad is None for parameter in model.parameters())
    found = collected.settle()
    names = {name: found[p] for name, p in model.named_parameters() if p in found}
    assert names.keys() == expected.keys()
    for name, gradient in names.items():
        scale = float(expected[name].abs().max())
        assert gradient.shape == expected[name].shape
        assert (whole(gradient) - expected[name]).abs().max() <= 1e-5 * scale + 1e-12, name
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_autograds_to_rounding(make_model: Make, family: str) -> None:
    one_by_one = family in ("qwen3_next", "mamba2", "jamba")
    expect_autograds(make_model(family), Mixing.ONE, 1)
    if not one_by_one:
        expect_autograds(make_model(family), Mixing.SAME_LENGTH, 1000)
    if family not in ("bloom", "qwen3_next", "mamba2", "jamba"):
        expect_autograds(make_model(family), Mixing.PADDED, 1000)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3_next"])
def test_experts_have_factors_however_they_are_computed(
    make_model: Make, family: str, experts: str
) -> None:
    model = make_model(family)
    model.set_experts_implementation(experts)
    names = expect_autograds(model, Mixing.ONE, 1)
    stacks = [g for name, g in names.items() if "experts" in name and g.ndim == 3]
    assert stacks and all(isinstance(g, Factored) for g in stacks)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "gemma2", "qwen3_moe"])
def test_no_gradient_of_a_matrix_is_made(make_model: Make, family: str) -> None:
    model = make_model(family)
    for name, gradient in expect_autograds(model, Mixing.ONE, 1).items():
        # A router for four experts is smaller than the factors of four tokens.
        small = gradient.ndim < 2 or min(gradient.shape) < 8
        assert isinstance(gradient, Factored) or small, name


def test_tied_and_untied_heads(make_model: Make) -> None:
    tied, untied = make_model("qwen3"), make_model("qwen3")
    untied.lm_head.weight = nn.Parameter(untied.model.embed_tokens.weight.detach().clone())
    together, apart = (expect_autograds(m, Mixing.ONE, 1) for m in (tied, untied))
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(
        whole(together[embedding]), whole(apart[embedding]) + whole(apart["lm_head.weight"])
    )


def test_products_of_other_forms() -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
    x = torch.randn(2, 3, 6)
    forms: list[Callable[[], Tensor]] = [
        lambda: F.linear(x, weight, bias),
        lambda: F.linear(x, weight.T, bias),
        lambda: x @ weight,
        lambda: torch.matmul(x, weight.t()),
        lambda: torch.addmm(bias, x[0], weight),
        lambda: x[0].mm(weight.mT),
        lambda: F.linear(x, weight[:3]),
        lambda: F.linear(x, weight * 2),
        lambda: F.linear(x[0, 0], weight),
        lambda: weight @ x.mT,
        lambda: F.embedding(torch.tensor([[1, 4], [1, 0]]), weight, padding_idx=1),
        lambda: F.embedding(torch.tensor([1, 1, 2]), weight, padding_idx=-2),
        lambda: F.embedding(torch.tensor([3]), weight) @ weight,
    ]
    for form in forms:
        expected = torch.autograd.grad(form().cos().sum(), [weight, bias], allow_unused=True)
        collected = StepGradients([weight, bias])
        with collected.collecting():
            torch.autograd.backward([form().cos().sum()])
        found = collected.settle()
        for parameter, gradient in zip((weight, bias), expected, strict=True):
            assert (parameter in found) == (gradient is not None)
            if gradient is not None:
                torch.testing.assert_close(whole(found[parameter]), gradient)


def test_what_needs_no_gradient_is_left_alone() -> None:
    weight, frozen = nn.Parameter(torch.ones(4, 4)), torch.ones(4, 4)
    collected = StepGradients([weight])
    with collected.collecting():
        with torch.no_grad():
            assert not F.linear(torch.ones(1, 4), weight).requires_grad
        assert not F.linear(torch.ones(1, 4), frozen).requires_grad
        assert not F.linear(torch.ones(1, 4), weight.detach()).requires_grad
    assert not collected.settle()


@DTYPES
@pytest.mark.parametrize("parts", [1, 256, 1024])
def test_a_gradient_in_many_equal_parts_is_the_gradient(dtype: torch.dtype, parts: int) -> None:
    """Of a parameter that autograd serves, and of one whose factors grow too long."""
    torch.manual_seed(1)
    scale, weight = (nn.Parameter(torch.zeros(64, 24, dtype=dtype)) for _ in range(2))
    gradient, x, dy = torch.randn(64, 24), torch.randn(5, 24).to(dtype), torch.randn(5, 64)
    collected = StepGradients([scale, weight])
    with collected.collecting():
        for _ in range(parts):
            loss = (scale * gradient.to(dtype)).sum() + (F.linear(x, weight) * dy.to(dtype)).sum()
            torch.autograd.backward([loss / parts])
            assert scale.grad is weight.grad is None
    found = collected.settle()
    assert isinstance(found[weight], Factored) == (parts == 1) == (not collected.held.made)
    product = dy.to(dtype).float().T @ x.float()
    for parameter, expected in ((scale, gradient), (weight, product)):
        got = whole(found[parameter]).float()
        torch.testing.assert_close(
            got, expected, rtol=2 * NOISE[dtype], atol=0.1 * NOISE[dtype] + 1e-4
        )


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


def test_a_pass_that_fails_leaves_no_gradient_and_the_next_is_right() -> None:
    weight = nn.Parameter(torch.ones(4))
    for ends in (False, True):
        collected = StepGradients([weight])
        try:
            with collected.collecting():
                torch.autograd.backward([weight.sum()])
                assert ends, "enough"
        except AssertionError:
            assert not ends
        assert weight.grad is None
    assert torch.equal(whole(collected.settle()[weight]), torch.ones(4))


@pytest.mark.parametrize("budget", [2, 100], ids=["in micro-batches", "at once"])
def test_a_tied_pair_in_16_bits_is_stepped_and_previewed(make_model: Make, budget: int) -> None:
    model = make_model("qwen3").bfloat16()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
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
