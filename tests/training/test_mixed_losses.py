"""Samples of several losses in one forward: each has its own, by its formula and its slope."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_trainer.optim import Apollo
from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.bucketed import Bucket, Inputs, losses
from apollo_trainer.training.evaluate import evaluate
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.guard import Guard, UpdateRefused
from apollo_trainer.training.loss import batch_loss, continuation_logits
from apollo_trainer.training.objectives import Clip
from apollo_trainer.training.samples import TokenizedSample, TopTokens
from apollo_trainer.training.step import StepPolicy, take_step
from tests.training.test_bucketed import check

Make = Callable[[str], Any]
V = 259
CLIP = Clip(0.1, 0.3)


def teacher(seed: int, tokens: int, k: int) -> TopTokens:
    """What a model of other weights could say."""
    generator = torch.Generator().manual_seed(seed)
    values, ids = torch.randn(tokens, V, generator=generator).log_softmax(1).topk(k)
    return TopTokens(ids.to(torch.int32), values)


PLAIN = TokenizedSample((3, 50, 7, 99), (140, 2, 77), 2.0, (1.0, 0.0, 3.0))
TAUGHT = TokenizedSample((11, 12), (13, 14), 0.5, targets=teacher(0, 2, 5))
TAUGHT_MORE = TokenizedSample(
    (3, 50, 7, 98), (62, 63, 64), 1.0, (0.0, 2.0, 0.5), targets=teacher(1, 3, 9)
)
SAMPLED = TokenizedSample(
    (3, 50, 7, 97), (20, 21, 22, 23), 1.5, (1.0, 1.0, 0.0, 2.0),
    advantages=(1.0, -2.0, 0.5, 0.0), sampler_log_probs=(-5.0, -6.5, -4.0, -5.5),
)  # fmt: skip
ALL = [PLAIN, TAUGHT, TAUGHT_MORE, SAMPLED]
MIXES = {
    "taught": [TAUGHT],
    "sampled": [SAMPLED],
    "taught by more and by fewer": [TAUGHT, TAUGHT_MORE],
    "plain and sampled": [PLAIN, SAMPLED],
    "all": ALL,
}


def losses_of(model: Any, sample: TokenizedSample) -> Tensor:
    """Of each token, as it is written, in float64."""
    logits = continuation_logits(model, sample.context_ids, sample.continuation_ids).double()
    log_probs = logits.log_softmax(1)
    own = log_probs.gather(1, torch.tensor(sample.continuation_ids)[:, None])[:, 0]
    if sample.targets is not None:
        p = sample.targets.log_probs.double().exp()
        q = log_probs.exp().gather(1, sample.targets.ids.long())
        p, q = (torch.cat([t, 1 - t.sum(1, keepdim=True)], 1) for t in (p, q))
        return (p * (p / q).log()).sum(1)
    if sample.advantages:
        ratio = (own - torch.tensor(sample.sampler_log_probs).double()).exp()
        advantages = torch.tensor(sample.advantages).double()
        clipped = ratio.clamp(1 - CLIP.low, 1 + CLIP.high)
        return -torch.minimum(ratio * advantages, clipped * advantages)
    return -own


def loss_of(model: Any, sample: TokenizedSample) -> float:
    return float(losses_of(model, sample).detach().sum())


def written(model: Any, samples: Sequence[TokenizedSample], divisor: float) -> Tensor:
    """The weighted loss of samples, as it is written."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        factors = torch.tensor(sample.token_weights or (1.0,) * len(sample.continuation_ids))
        total = total + sample.weight * (losses_of(model, sample) * factors).sum()
    return total / divisor


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward([loss])
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("samples", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_one_forward_gives_each_its_own_loss_and_gradient(
    make_model: Make, family: str, samples: list[TokenizedSample]
) -> None:
    model = make_model(family)
    (batch,) = plan_batches(samples, 1000, Mixing.PADDED)
    loss, sums = batch_loss(model, batch, FrozenContexts(model), 3.0, CLIP)
    expected = written(model, samples, 3.0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    for index, told in zip(batch.indices, sums[0].tolist(), strict=True):
        assert told == pytest.approx(loss_of(model, samples[index]), rel=1e-4)
    got, wanted = gradients(model, loss), gradients(model, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("samples", MIXES.values(), ids=MIXES)
def test_the_gradient_is_the_slope_of_the_loss_along_the_parameters(
    make_model: Make, samples: list[TokenizedSample]
) -> None:
    """In float32; contexts of one token, which nothing freezes."""
    model, step = make_model("qwen3"), 2e-3
    short = [replace(sample, context_ids=sample.context_ids[-1:]) for sample in samples]
    (batch,) = plan_batches(short, 1000, Mixing.PADDED)

    def loss() -> Tensor:
        return batch_loss(model, batch, FrozenContexts(model), 3.0, Clip(0.0, 0.0))[0]

    got = gradients(model, loss())
    norm = math.sqrt(sum(float(g.square().sum()) for g in got.values()))
    ahead = []
    for distance in (step, -step):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(got[name], alpha=distance / norm)
            ahead.append(float(loss()))
            for name, parameter in model.named_parameters():
                parameter.sub_(got[name], alpha=distance / norm)
    assert (ahead[0] - ahead[1]) / (2 * step) == pytest.approx(norm, rel=2e-2)


@pytest.mark.parametrize("samples", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_a_bucket_says_what_its_micro_batch_says(
    make_model: Make, family: str, samples: list[TokenizedSample]
) -> None:
    model = make_model(family)
    (batch,) = plan_batches(samples, 1000, Mixing.PADDED)
    inputs = Inputs(Bucket.of(batch, clip=CLIP), model.device)
    for divisor in (3.0, 5.0):
        check(model, batch, inputs, divisor, clip=CLIP)


def test_what_was_taught_before_is_gone_from_a_bucket(make_model: Make) -> None:
    model = make_model("qwen3")
    other = [replace(TAUGHT, targets=None), replace(PLAIN, targets=teacher(7, 3, 5))]
    mixes = [[TAUGHT, PLAIN, SAMPLED], [*other, replace(SAMPLED, advantages=(9.0,) * 4)]]
    batches = [plan_batches(samples, 1000, Mixing.PADDED)[0] for samples in mixes]
    assert Bucket.of(batches[0]) == Bucket.of(batches[1])
    inputs = Inputs(Bucket.of(batches[0]), model.device)
    for batch in (*batches, batches[0]):
        check(model, batch, inputs, 3.0)


def test_a_bucket_of_any_losses_is_proven_by_cross_entropy(make_model: Make) -> None:
    """Before anything else is in it; a graph's gradient is then no other's noise."""
    model = make_model("qwen3")
    (batch,) = plan_batches(ALL, 1000, Mixing.PADDED)
    plain = replace(batch, samples=tuple(sample.plain for sample in batch.samples))
    inputs = Inputs(Bucket.of(batch, clip=CLIP), model.device)
    inputs.fill(plain, 3.0)
    (got, sums), expected = (
        losses(model, inputs),
        batch_loss(model, plain, FrozenContexts(model), 3.0),
    )
    torch.testing.assert_close(sums[0], expected[1][0], rtol=1e-5, atol=1e-5)
    found, wanted = gradients(model, got), gradients(model, expected[0])
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_shapes_of_a_bucket_tell_losses_apart() -> None:
    batches = [plan_batches(samples, 1000, Mixing.PADDED)[0] for samples in MIXES.values()]
    shapes = [(Bucket.of(b).top_k, Bucket.of(b, clip=CLIP).policy) for b in batches]
    assert shapes == [(5, None), (0, CLIP), (9, None), (0, CLIP), (9, CLIP)]


@pytest.mark.parametrize("budget", [1000, 4])
def test_a_step_of_several_losses_tells_each_and_learns_their_mean(
    make_model: Make, budget: int
) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    weight = sum(s.weight * sum(s.token_weights or (1.0,) * len(s.continuation_ids)) for s in ALL)
    norms = gradients(model, written(model, ALL, weight)).values()
    expected = [loss_of(model, s) for s in ALL]
    result = take_step(model, optimizer, ALL, StepPolicy(budget, dry_run=True, clip=CLIP))
    assert result.tokens == 12
    assert result.loss_sum == pytest.approx(sum(expected), rel=1e-4)
    assert result.loss == pytest.approx(sum(expected) / 12, rel=1e-4)
    means = [e / len(s.continuation_ids) for e, s in zip(expected, ALL, strict=True)]
    assert result.sample_losses == pytest.approx(means, rel=1e-4)
    norm = math.sqrt(sum(float(g.square().sum()) for g in norms))
    assert result.grad_norm == pytest.approx(norm, rel=1e-3)
    assert result.anchor_loss is None


def sampled_now(model: Any, advantages: tuple[float, ...], off: float = 0.0) -> TokenizedSample:
    """A continuation whose ratios are all exp(off)."""
    logits = continuation_logits(model, SAMPLED.context_ids, SAMPLED.continuation_ids)
    own = logits.log_softmax(1).gather(1, torch.tensor(SAMPLED.continuation_ids)[:, None])[:, 0]
    told = tuple((own - off).tolist())
    return replace(SAMPLED, token_weights=(), advantages=advantages, sampler_log_probs=told)


@pytest.mark.parametrize("off", [0.0, 0.25, -0.25])
def test_policy_figures_are_means_over_its_tokens(make_model: Make, off: float) -> None:
    model = make_model("qwen3")
    sample = sampled_now(model, (1.0, -1.0, 1.0, 1.0), off)
    optimizer = Apollo(model.named_parameters(), rank=8)
    result = take_step(model, optimizer, [PLAIN, sample], StepPolicy(dry_run=True))
    assert result.policy is not None
    assert result.policy.mean_ratio == pytest.approx(math.exp(off), rel=1e-4)
    assert result.policy.kl == pytest.approx(-off, abs=1e-5)
    # Above 1.2 the three that are to rise no longer count, below 0.8 the one that is to fall.
    assert result.policy.clipped_fraction == {0.0: 0.0, 0.25: 0.75, -0.25: 0.25}[off]
    assert take_step(model, optimizer, [PLAIN], StepPolicy(dry_run=True)).policy is None


def test_good_tokens_become_likelier_and_bad_ones_less_likely(make_model: Make) -> None:
    model = make_model("qwen3")
    good = sampled_now(model, (1.0,) * 4)
    bad = replace(good, context_ids=(60, 61), advantages=(-1.0,) * 4)
    before = evaluate(model, [good, bad])
    optimizer = Apollo(model.named_parameters(), rank=8, lr=1e-3)
    for _ in range(3):
        take_step(model, optimizer, [good, bad])
    after = evaluate(model, [good, bad])
    assert after[0] < before[0] and after[1] > before[1]


def test_a_policy_loss_below_zero_is_no_loss_that_was_reached(make_model: Make) -> None:
    model = make_model("qwen3")
    sample = sampled_now(model, (1.0,) * 4)
    optimizer = Apollo(model.named_parameters(), rank=8)
    for guard in (Guard(), Guard(min_loss=0.5)):
        result = take_step(model, optimizer, [sample], StepPolicy(guard=guard))
        assert result.loss < 0 and result.optimizer_step > 0
    worse = replace(sample, advantages=(-100.0,) * 4)
    with pytest.raises(UpdateRefused) as caught:
        take_step(model, optimizer, [worse], StepPolicy(guard=Guard(max_loss=10.0)))
    assert caught.value.reason == "GUARD_MAX_LOSS"
