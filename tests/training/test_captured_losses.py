"""CUDA graphs of several losses, of anchors, and of some parameters: what the passes say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.delta_rule import choose_delta_rule
from apollo_trainer.training.faster import speed_up
from apollo_trainer.training.filter import chosen, learning_only
from apollo_trainer.training.objectives import Clip
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import DEFAULT_POLICY, StepPolicy, StepResult, take_step
from apollo_trainer.training.teacher import top_tokens
from tests.training.test_mixed_losses import ALL, MIXES, PLAIN, SAMPLED, TAUGHT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Make = Callable[[str], Any]


def trained(
    model: Any,
    samples: list[TokenizedSample],
    passes: CapturedPasses | None,
    policy: StepPolicy = DEFAULT_POLICY,
    **how: Any,
) -> list[StepResult]:
    optimizer = Apollo(model.named_parameters(), rank=8, seed=5, lr=1e-3)
    optimizer.measure = True
    return [take_step(model, optimizer, samples, policy, passes=passes, **how) for _ in range(12)]


def figures(result: StepResult) -> list[float]:
    policy = vars(result.policy).values() if result.policy else ()
    anchor = () if result.anchor_loss is None else (result.anchor_loss,)
    return [result.loss, result.grad_norm, *result.sample_losses, *anchor, *policy]


def same(one: StepResult, other: StepResult) -> None:
    assert figures(one) == pytest.approx(figures(other), rel=0.02, abs=0.01)


@pytest.mark.parametrize("budget", [1000, 4])
@pytest.mark.parametrize("samples", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_steps_of_any_losses_are_those_without_graphs(
    make_model: Make, family: str, samples: list[TokenizedSample], budget: int
) -> None:
    told = []
    for captured in (False, True):
        model = make_model(family).to("cuda")
        choose_delta_rule(model)
        speed_up(model)
        passes = CapturedPasses(model) if captured else None
        policy = StepPolicy(budget, clip=Clip(0.0, 0.0))
        told.append(trained(model, samples, passes, policy))
        assert passes is None or (len(passes) > 0 and not passes.refusal)
    for one, other in zip(*told, strict=True):
        same(one, other)


def test_anchors_are_captured_from_where_they_are_zero_on(make_model: Make) -> None:
    told = []
    for captured in (False, True):
        model = make_model("qwen3").to("cuda")
        passes = CapturedPasses(model) if captured else None
        (top,) = top_tokens(model, [replace(TAUGHT, context_ids=(80, 81))], 20)
        anchor = replace(TAUGHT, context_ids=(80, 81), targets=top)
        told.append(trained(model, [PLAIN], passes, anchors=[anchor], anchor_weight=2.0))
        assert passes is None or (len(passes) == 1 and not passes.refusal)
    for one, other in zip(*told, strict=True):
        same(one, other)
    assert told[0][0].anchor_loss == pytest.approx(0.0, abs=1e-5)
    assert told[0][-1].anchor_loss != pytest.approx(0.0, abs=1e-5)


def test_another_clip_is_another_graph(make_model: Make) -> None:
    model = make_model("qwen3").to("cuda")
    passes, optimizer = CapturedPasses(model), Apollo(model.named_parameters(), rank=8, lr=0.0)
    far = replace(SAMPLED, sampler_log_probs=(-12.0,) * 4)
    results = [
        take_step(model, optimizer, [far], StepPolicy(clip=clip), passes=passes)
        for clip in (Clip(), Clip(0.0, 0.0))
        for _ in range(3)
    ]
    assert len(passes) == 2
    assert results[2].sample_losses == pytest.approx(results[0].sample_losses, rel=1e-3)
    assert results[5].sample_losses == pytest.approx(results[3].sample_losses, rel=1e-3)
    assert results[0].sample_losses != pytest.approx(results[3].sample_losses, rel=1e-2)


def test_a_clipped_gradient_of_a_graph_is_that_of_the_passes(make_model: Make) -> None:
    told = []
    for captured in (False, True):
        model = make_model("qwen3").to("cuda")
        passes = CapturedPasses(model) if captured else None
        told.append(trained(model, ALL, passes, StepPolicy(clip_grad_norm=0.25)))
    for one, other in zip(*told, strict=True):
        same(one, other)
        assert one.grad_norm > 0.25


def test_graphs_follow_what_learns(make_model: Make) -> None:
    """A graph of other parameters would write what is not to learn, or nothing."""
    told = []
    for captured in (False, True):
        model = make_model("qwen3").to("cuda")
        passes = CapturedPasses(model) if captured else None
        optimizer = Apollo(model.named_parameters(), rank=8, lr=1e-3)
        names = chosen((name for name, _ in model.named_parameters()), layers=[1])
        results = []
        for part in (False, True, False):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            with learning_only(model, names) if part else nullcontext():
                for _ in range(4):
                    results.append(take_step(model, optimizer, [PLAIN], passes=passes))
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            assert moved == (names if part else before.keys())
            assert passes is None or len(passes) == 1
        told.append(results)
    for one, other in zip(*told, strict=True):
        same(one, other)
