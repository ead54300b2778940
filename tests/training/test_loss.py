"""The continuation's loss with its context frozen: values, gradients, weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from apollo_trainer.training.loss import continuation_logits, continuation_loss
from apollo_trainer.training.samples import TokenizedSample

Make = Callable[[str], Any]
FAMILIES = ("qwen3", "gpt2")
EVERY_KIND = (
    *FAMILIES,
    "opt",
    "bloom",
    "gemma2",
    "gemma3",
    "qwen3_moe",
    "qwen3_next",
    "mamba2",
)
LINEAR_ATTENTION = ("qwen3_next", "mamba2")
LONG = TokenizedSample((3, 50, 7, 99, 12), (140, 2, 77, 30))
SHORT = TokenizedSample((12,), (140, 2, 77, 30))
SAMPLES = {
    "long context": LONG,
    "one context token": SHORT,
    "one to learn": TokenizedSample((3, 5), (9,)),
}


def full_losses(model: Any, sample: TokenizedSample) -> torch.Tensor:
    """Loss of each continuation token by one plain forward over everything: [T]."""
    ids = torch.tensor([[*sample.context_ids, *sample.continuation_ids]])
    logits = model(ids, use_cache=False).logits[0, len(sample.context_ids) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(sample.continuation_ids), reduction="none")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.autograd.backward([loss])
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def gradients_with_detached_context(model: Any, sample: TokenizedSample) -> dict[str, Any]:
    """One forward without a cache, whose attention detaches keys and values of the context."""
    frozen = len(sample.context_ids) - 1

    def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        key, value = (
            torch.cat([t[:, :, :frozen].detach(), t[:, :, frozen:]], dim=2) for t in (key, value)
        )
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("detached_context", attention)
    AttentionMaskInterface.register("detached_context", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("detached_context")
    try:
        return gradients(model, full_losses(model, sample).sum())
    finally:
        model.set_attn_implementation(before)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
@pytest.mark.parametrize("family", EVERY_KIND)
def test_the_loss_is_that_of_a_full_forward(
    make_model: Make, family: str, sample: TokenizedSample
) -> None:
    model = make_model(family)
    loss, losses = continuation_loss(model, sample), full_losses(model, sample)
    torch.testing.assert_close(loss.weighted, losses.sum())
    assert loss.loss_sum == pytest.approx(losses.sum().item(), rel=1e-5)
    assert loss.tokens == len(sample.continuation_ids)


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_detached_context_keys_and_values(
    make_model: Make, family: str, sample: TokenizedSample
) -> None:
    model = make_model(family)
    expected = gradients_with_detached_context(model, sample)
    assert_same(gradients(model, continuation_loss(model, sample).weighted), expected)


class AheadAfterTheContext:
    """A model that reads the context, and continues with its weights moved along a direction."""

    def __init__(self, model: Any, direction: dict[str, torch.Tensor], step: float):
        self.model, self.device = model, model.device
        self.direction, self.step = direction, step

    @torch.no_grad()
    def move(self, step: float) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.add_(self.direction[name], alpha=step)

    def __call__(self, ids: torch.Tensor, **arguments: Any) -> Any:
        if "logits_to_keep" in arguments:  # the context
            return self.model(ids, **arguments)
        self.move(self.step)
        try:
            return self.model(ids, **arguments)
        finally:
            self.move(-self.step)


@pytest.mark.parametrize("family", (*FAMILIES, *LINEAR_ATTENTION))
def test_the_gradient_is_the_slope_of_the_loss_while_the_context_stays(
    make_model: Make, family: str
) -> None:
    model, step = make_model(family).double(), 2e-3
    model.set_experts_implementation("eager")  # the grouped product has no float64
    got = gradients(model, continuation_loss(model, LONG).weighted)
    torch.manual_seed(8)
    direction = {name: torch.randn_like(g) / g.numel() ** 0.5 for name, g in got.items()}
    with torch.no_grad():
        ahead, behind = (
            float(continuation_loss(AheadAfterTheContext(model, direction, s), LONG).weighted)
            for s in (step, -step)
        )
    slope = sum(float((g * direction[name]).sum()) for name, g in got.items())
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_one_context_token_it_is_the_gradient_of_prompt_masking(
    make_model: Make, family: str
) -> None:
    model = make_model(family)
    expected = gradients(model, full_losses(model, SHORT).sum())
    assert_same(gradients(model, continuation_loss(model, SHORT).weighted), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_more_context_it_is_another_gradient_than_prompt_masking(
    make_model: Make, family: str
) -> None:
    model = make_model(family)
    masked = gradients(model, full_losses(model, LONG).sum())
    frozen = gradients(model, continuation_loss(model, LONG).weighted)
    changed = max(float((masked[n] - g).norm() / masked[n].norm()) for n, g in frozen.items())
    assert changed > 0.05


def test_context_tokens_before_the_last_get_no_gradient(make_model: Make) -> None:
    model = make_model("gpt2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    torch.autograd.backward([continuation_loss(model, LONG).weighted])
    rows = model.transformer.wte.weight.grad.abs().sum(-1)
    assert set(rows.nonzero()[:, 0].tolist()) == {12, *LONG.continuation_ids[:-1]}


def test_the_first_continuation_token_is_learned(make_model: Make) -> None:
    model = make_model("qwen3")
    only_first = TokenizedSample(LONG.context_ids, LONG.continuation_ids, 1.0, (1, 0, 0, 0))
    loss = continuation_loss(model, only_first)
    torch.testing.assert_close(loss.weighted, full_losses(model, LONG)[0])
    assert max(float(g.abs().max()) for g in gradients(model, loss.weighted).values()) > 0


def test_token_weights_and_the_sample_weight_scale_the_loss_not_its_report(
    make_model: Make,
) -> None:
    model, weights = make_model("qwen3"), (0.5, 0.0, 2.0, 1.0)
    sample = TokenizedSample(LONG.context_ids, LONG.continuation_ids, 3.0, weights)
    loss, losses = continuation_loss(model, sample), full_losses(model, LONG)
    torch.testing.assert_close(loss.weighted, 3.0 * (losses * torch.tensor(weights)).sum())
    assert loss.loss_sum == pytest.approx(losses.sum().item(), rel=1e-5)


def test_a_second_call_sees_new_weights_in_the_context_too(make_model: Make) -> None:
    model = make_model("qwen3")
    before = continuation_logits(model, LONG.context_ids, LONG.continuation_ids).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = continuation_logits(model, LONG.context_ids, LONG.continuation_ids)
    ids = torch.tensor([[*LONG.context_ids, *LONG.continuation_ids]])
    torch.testing.assert_close(
        after, model(ids).logits[0, len(LONG.context_ids) - 1 : -1], rtol=1e-4, atol=1e-4
    )
    assert (after - before).abs().max() > 0.1
